// What the stand-ins for CUDA's libraries share. They are built by build.sh.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Stream;

// Misuse that a real library answers with undefined behaviour ends the process.
[[noreturn]] static inline void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "simulated GPU: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    abort();
}

// Of driver.cc: puts work on a stream.
EXPORT void simulated_enqueue(Stream* stream, void (*work)(void*), void* argument);
// Of driver.cc: ends the process unless all `bytes` at `address` are memory of one device.
EXPORT void simulated_check_memory(uint64_t address, size_t bytes, const char* what);
// Of driver.cc: the device of the thread's current context, or -1.
EXPORT int simulated_current_device();

static inline void enqueue(Stream* stream, std::function<void()> work) {
    simulated_enqueue(
        stream,
        [](void* argument) {
            auto* work = static_cast<std::function<void()>*>(argument);
            (*work)();
            delete work;
        },
        new std::function<void()>(std::move(work)));
}
