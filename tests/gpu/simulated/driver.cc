// libcuda.so on a machine without a GPU: devices whose memory is the host's and whose threads are fibers.
//
// - A stream is a queue with a thread of its own, so host, computation and communication overlap as they do on a device. With
//   SIMULATED_GPU_JITTER=N, work of a stream is now and then late by up to N microseconds: what is in order only by luck is not.
// - Threads run one after the other from barrier to barrier. With SIMULATED_GPU_ORDER=SEED the turns of blocks, warps and lanes are drawn,
//   and whether copies in the background happen at once or as late as they may: what needs a barrier that is not there shows.
// - New memory and a block's dynamic shared memory are filled with NaNs: what is read before it is written shows.
// - Copies are checked against what is allocated, and a launch that is given another device's memory ends the process.
//
// SIMULATED_GPUS (1), SIMULATED_GPU_MEMORY (bytes, 8 GiB) and SIMULATED_GPU_CAPABILITY (90: 9.0) say what there is;
// CUDA_VISIBLE_DEVICES chooses as always.
#include <sys/mman.h>
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "simulated_gpu.h"

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
};

static size_t setting(const char* name, size_t otherwise) {
    const char* value = getenv(name);
    return value ? strtoull(value, nullptr, 10) : otherwise;
}

// ---- Devices and contexts ----

struct Context {
    int number;  // among all devices of the machine
    size_t used = 0;
};

static std::vector<std::unique_ptr<Context>> devices;
static thread_local std::vector<Context*> contexts;
static std::recursive_mutex lock;
typedef std::lock_guard<std::recursive_mutex> Locked;

static Context* current() { return contexts.empty() ? nullptr : contexts.back(); }
static size_t memory_bytes() { return setting("SIMULATED_GPU_MEMORY", size_t(8) << 30); }
static void uuid_of(int number, unsigned char* bytes) {
    // Different from the first bits on, as those of real devices are.
    for (int i = 0; i < 16; i++) bytes[i] = 0x5d + 37 * number + 11 * i;
}

static std::string uuid_text(int number) {
    unsigned char bytes[16];
    char text[41] = "GPU-";
    uuid_of(number, bytes);
    for (int i = 0, at = 4; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text[at++] = '-';
        at += snprintf(text + at, 3, "%02x", bytes[i]);
    }
    return text;
}

EXPORT int simulated_current_device() { return current() ? current()->number : -1; }

EXPORT int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    Locked locked(lock);
    if (!devices.empty()) return SUCCESS;
    int all = (int)setting("SIMULATED_GPUS", 1);
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) {
        for (int number = 0; number < all; number++) devices.emplace_back(new Context{number});
    } else {
        std::string rest = visible;
        while (!rest.empty()) {
            std::string word = rest.substr(0, rest.find(','));
            rest = rest.size() > word.size() ? rest.substr(word.size() + 1) : "";
            int number = -1;
            if (word.rfind("GPU-", 0) == 0) {
                for (int other = 0; other < all; other++)
                    if (uuid_text(other).rfind(word, 0) == 0) number = other;
            } else if (!word.empty()) {
                number = atoi(word.c_str());
            }
            // As the driver does it: what comes after an unknown device is not visible.
            if (number < 0 || number >= all) break;
            devices.emplace_back(new Context{number});
        }
    }
    return devices.empty() ? NO_DEVICE : SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

EXPORT int cuDeviceGetCount(int* count) {
    *count = (int)devices.size();
    return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal >= (int)devices.size()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "Simulated GPU");
    return SUCCESS;
}

EXPORT int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    uuid_of(devices[device]->number, uuid);
    return SUCCESS;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory_bytes();
    return SUCCESS;
}

EXPORT int cuDeviceGetPCIBusId(char* text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", 0x10 + devices[device]->number);
    return SUCCESS;
}

static int capability() { return (int)setting("SIMULATED_GPU_CAPABILITY", 90); }

// Most shared memory of a block, by compute capability (CUDA programming guide, technical specifications).
static int most_shared_bytes() {
    switch (capability()) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: case 121: return 99 << 10;
    case 90: case 100: case 103: case 110: return 227 << 10;
    }
    die("compute capability %d is not simulated", capability());
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
    case 75: *value = capability() / 10; return SUCCESS;
    case 76: *value = capability() % 10; return SUCCESS;
    case 97: *value = most_shared_bytes(); return SUCCESS;
    }
    die("device attribute %d is not simulated", attribute);
}

EXPORT int cuDevicePrimaryCtxRetain(Context** context, int device) {
    *context = devices[device].get();
    return SUCCESS;
}

EXPORT int cuCtxSetCurrent(Context* context) {
    if (!contexts.empty()) contexts.pop_back();
    if (context) contexts.push_back(context);
    return SUCCESS;
}

EXPORT int cuCtxPushCurrent_v2(Context* context) {
    if (!context) return INVALID_CONTEXT;
    contexts.push_back(context);
    return SUCCESS;
}

EXPORT int cuCtxPopCurrent_v2(Context** context) {
    if (contexts.empty()) return INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}

EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (!current()) return INVALID_CONTEXT;
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

// ---- Memory ----

struct Region {
    size_t bytes;
    Context* device;
};
static std::map<uint64_t, Region> regions;  // What is backed, by its address.
static std::map<uint64_t, size_t> physical;  // Created and perhaps mapped.
static uint64_t last_physical = 0;
enum { GRANULARITY = 2 << 20 };

// The device whose memory holds the address; null for anything else.
static Context* device_of(uint64_t address, uint64_t* end = nullptr) {
    Locked locked(lock);
    auto next = regions.upper_bound(address);
    if (next == regions.begin()) return nullptr;
    auto& [at, region] = *std::prev(next);
    if (address >= at + region.bytes) return nullptr;
    if (end) *end = at + region.bytes;
    return region.device;
}

EXPORT void simulated_check_memory(uint64_t address, size_t bytes, const char* what) {
    Context* device = nullptr;
    // Neighbours in an arena are one memory to those who use it.
    for (uint64_t at = address; at < address + bytes;) {
        uint64_t end;
        Context* here = device_of(at, &end);
        if (!here || (device && here != device)) die("%s: %zu bytes at %#lx are no memory of one device", what, bytes, (unsigned long)address);
        device = here;
        at = end;
    }
}

static int take(Context* device, size_t bytes) {
    if (device->used + bytes > memory_bytes()) return OUT_OF_MEMORY;
    device->used += bytes;
    return SUCCESS;
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (!current()) return INVALID_CONTEXT;
    Locked locked(lock);
    *total = memory_bytes();
    *free = *total - current()->used;
    return SUCCESS;
}

EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (!current()) return INVALID_CONTEXT;
    if (!bytes) return INVALID_VALUE;
    Locked locked(lock);
    if (take(current(), bytes)) return OUT_OF_MEMORY;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return OUT_OF_MEMORY;
    memset(at, 0xff, bytes);
    *address = (uint64_t)at;
    regions[*address] = {bytes, current()};
    return SUCCESS;
}

static void finish_everything();

EXPORT int cuMemFree_v2(uint64_t address) {
    if (!current()) return INVALID_CONTEXT;
    finish_everything();
    Locked locked(lock);
    auto found = regions.find(address);
    if (found == regions.end()) return INVALID_VALUE;
    found->second.device->used -= found->second.bytes;
    munmap((void*)address, found->second.bytes);
    regions.erase(found);
    return SUCCESS;
}

EXPORT int cuMemGetAllocationGranularity(size_t* bytes, const void*, int) {
    *bytes = GRANULARITY;
    return SUCCESS;
}

EXPORT int cuMemAddressReserve(uint64_t* address, size_t bytes, size_t, uint64_t, uint64_t) {
    void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return OUT_OF_MEMORY;
    *address = (uint64_t)at;
    return SUCCESS;
}

// CUmemAllocationProp begins with the kind of memory, the kinds of handles, and where it shall be.
EXPORT int cuMemCreate(uint64_t* handle, size_t bytes, const int* properties, uint64_t) {
    if (bytes % GRANULARITY) return INVALID_VALUE;
    Locked locked(lock);
    if (take(devices[properties[3]].get(), bytes)) return OUT_OF_MEMORY;
    *handle = ++last_physical;
    physical[*handle] = bytes;
    return SUCCESS;
}

EXPORT int cuMemRelease(uint64_t handle) {
    Locked locked(lock);
    if (auto found = physical.find(handle); found != physical.end()) {
        current()->used -= found->second;
        physical.erase(found);
    }
    return SUCCESS;
}

EXPORT int cuMemMap(uint64_t, size_t bytes, size_t offset, uint64_t handle, uint64_t) {
    Locked locked(lock);
    return physical[handle] == bytes && !offset ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuMemUnmap(uint64_t address, size_t bytes) {
    Locked locked(lock);
    auto found = regions.find(address);
    if (found == regions.end() || found->second.bytes != bytes) return INVALID_VALUE;
    regions.erase(found);
    // Whoever uses it still is told by a fault.
    if (mmap((void*)address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        return INVALID_VALUE;
    return SUCCESS;
}

// CUmemAccessDesc begins with where the access comes from.
EXPORT int cuMemSetAccess(uint64_t address, size_t bytes, const int* access, size_t count) {
    if (count != 1) return INVALID_VALUE;
    if (mprotect((void*)address, bytes, PROT_READ | PROT_WRITE)) return INVALID_VALUE;
    memset((void*)address, 0xff, bytes);
    Locked locked(lock);
    regions[address] = {bytes, devices[access[1]].get()};
    return SUCCESS;
}

// ---- Streams and events ----

typedef std::chrono::steady_clock Clock;

struct Event {
    std::mutex lock;
    std::condition_variable happened_now;
    uint64_t recorded = 0, happened = 0;
    Clock::time_point when;
    bool destroyed = false;
    bool has_clock = false;
};

struct Stream {
    Context* device;
    std::mutex lock;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool busy = false, destroyed = false;
    unsigned seed;

    void put(std::function<void()> work) {
        std::lock_guard<std::mutex> locked(lock);
        if (destroyed) die("work for a stream that is destroyed");
        queue.push_back(std::move(work));
        changed.notify_all();
    }

    void run() {
        static const size_t jitter = setting("SIMULATED_GPU_JITTER", 0);
        std::unique_lock<std::mutex> locked(lock);
        for (;;) {
            changed.wait(locked, [&] { return !queue.empty() || destroyed; });
            if (queue.empty()) return;
            auto work = std::move(queue.front());
            queue.pop_front();
            busy = true;
            locked.unlock();
            if (jitter && rand_r(&seed) % 8 == 0) usleep(rand_r(&seed) % jitter);
            work();
            work = nullptr;
            locked.lock();
            busy = false;
            changed.notify_all();
        }
    }

    void finish() {
        std::unique_lock<std::mutex> locked(lock);
        changed.wait(locked, [&] { return queue.empty() && !busy; });
    }
};

static std::vector<Stream*> streams;

// A stream is never freed: its thread may still run.
EXPORT int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) {
    if (!current()) return INVALID_CONTEXT;
    if (flags != 1) die("a stream that waits for the default stream");
    Locked locked(lock);
    *stream = new Stream;
    (*stream)->device = current();
    (*stream)->seed = (unsigned)streams.size() * 7919 + getpid();
    streams.push_back(*stream);
    std::thread([stream = *stream] {
        contexts.push_back(stream->device);
        stream->run();
    }).detach();
    return SUCCESS;
}

EXPORT int cuStreamCreate(Stream** stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

EXPORT int cuStreamDestroy_v2(Stream* stream) {
    std::lock_guard<std::mutex> locked(stream->lock);
    if (stream->destroyed) die("a stream is destroyed twice");
    stream->destroyed = true;
    stream->changed.notify_all();
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(Stream* stream) {
    stream->finish();
    return SUCCESS;
}

static void finish_everything() {
    std::vector<Stream*> all;
    {
        Locked locked(lock);
        all = streams;
    }
    for (Stream* stream : all) stream->finish();
}

EXPORT void simulated_enqueue(Stream* stream, void (*work)(void*), void* argument) {
    stream->put([=] { work(argument); });
}

EXPORT int cuEventCreate(Event** event, unsigned flags) {
    if (!current()) return INVALID_CONTEXT;
    *event = new Event;
    (*event)->has_clock = !(flags & 2);
    return SUCCESS;
}

// Kept, so that a use after this can be told.
EXPORT int cuEventDestroy_v2(Event* event) {
    std::lock_guard<std::mutex> locked(event->lock);
    if (event->destroyed) die("an event is destroyed twice");
    event->destroyed = true;
    return SUCCESS;
}

static uint64_t turn_of(Event* event, const char* who, bool next) {
    std::lock_guard<std::mutex> locked(event->lock);
    if (event->destroyed) die("%s of an event that is destroyed", who);
    return next ? ++event->recorded : event->recorded;
}

EXPORT int cuEventRecord(Event* event, Stream* stream) {
    uint64_t turn = turn_of(event, "cuEventRecord", true);
    stream->put([=] {
        std::lock_guard<std::mutex> locked(event->lock);
        event->happened = turn;
        event->when = Clock::now();
        event->happened_now.notify_all();
    });
    return SUCCESS;
}

EXPORT int cuEventQuery(Event* event) {
    turn_of(event, "cuEventQuery", false);
    std::lock_guard<std::mutex> locked(event->lock);
    return event->happened == event->recorded ? SUCCESS : NOT_READY;
}

EXPORT int cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    if (flags) return INVALID_VALUE;
    uint64_t turn = turn_of(event, "cuStreamWaitEvent", false);
    stream->put([=] {
        std::unique_lock<std::mutex> locked(event->lock);
        event->happened_now.wait(locked, [&] { return event->happened >= turn; });
    });
    return SUCCESS;
}

EXPORT int cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (!start->has_clock || !end->has_clock) return INVALID_HANDLE;
    if (cuEventQuery(start) || cuEventQuery(end)) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
    return SUCCESS;
}

// ---- Copies ----

// Memory of the host that is not pinned has been read when the call returns.
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    if (!current()) return INVALID_CONTEXT;
    simulated_check_memory(to, bytes, "a copy to a device");
    auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
    stream->put([=] { memcpy((void*)to, staged->data(), bytes); });
    return SUCCESS;
}

// As late as it may come: a caller that reads before it has waited is found out.
EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    if (!current()) return INVALID_CONTEXT;
    simulated_check_memory(from, bytes, "a copy from a device");
    stream->put([=] { memcpy(to, (void*)from, bytes); });
    return SUCCESS;
}

EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    simulated_check_memory(to, bytes, "a copy to a device");
    simulated_check_memory(from, bytes, "a copy from a device");
    stream->put([=] { memmove((void*)to, (void*)from, bytes); });
    return SUCCESS;
}

EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
    simulated_check_memory(to, bytes, "a memset");
    stream->put([=] { memset((void*)to, value, bytes); });
    return SUCCESS;
}

// ---- Kernels ----

struct Position { unsigned x, y, z; };

// As in simulated.h.
struct Simulated {
    Position thread, block, block_size, grid_size;
    unsigned char* shared;
    unsigned shared_bytes;
    bool copies_at_once;
    const unsigned* round;
    unsigned char (*places)[32][64];
    void (*wait_for_warp)();
    void (*wait_for_block)();
};

struct Module {
    void* library;
    Simulated* simulated;
};

struct Function {
    Module* module;
    std::string name;
    void (*run)(void**);
    std::vector<size_t> sizes;
    size_t shared_max = 48 << 10;
};

// The image is a shared object, whose last part is the table of its sections.
EXPORT int cuModuleLoadData(Module** module, const void* image) {
    const auto* header = (const Elf64_Ehdr*)image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return INVALID_IMAGE;
    size_t bytes = header->e_shoff + (size_t)header->e_shentsize * header->e_shnum;
    char path[] = "/tmp/simulated-module-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return OUT_OF_MEMORY;
    bool written = write(file, image, bytes) == (ssize_t)bytes;
    close(file);
    void* library = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) fprintf(stderr, "simulated GPU: %s\n", dlerror());
    unlink(path);
    if (!library) return INVALID_IMAGE;
    *module = new Module{library, (Simulated*)dlsym(library, "simulated")};
    return SUCCESS;
}

EXPORT int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    auto* run = (void (*)(void**))dlsym(module->library, (std::string("simulated_kernel_") + name).c_str());
    auto* sizes = (size_t (*)(size_t*))dlsym(module->library, (std::string("simulated_sizes_") + name).c_str());
    if (!run || !sizes) return NOT_FOUND;
    *function = new Function{module, name, run, {}};
    (*function)->sizes.resize(sizes(nullptr) + 1);
    sizes((*function)->sizes.data());
    (*function)->sizes.pop_back();
    return SUCCESS;
}

EXPORT int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8) die("function attribute %d is not simulated", attribute);
    if (value > most_shared_bytes()) return INVALID_VALUE;
    function->shared_max = value;
    return SUCCESS;
}

// What the threads of the block that runs wait for, and where they go on.
enum Wants : unsigned char { NOTHING, WARP, BLOCK, END };
enum { THREADS = 1024, STACK_BYTES = 64 << 10 };
static Wants wants[THREADS];
static void* places_to_go_on[THREADS];
static struct Warp {
    unsigned arrived, round;
    unsigned char places[2][32][64];
} warps[THREADS / 32];
static char* stacks;
static void* scheduler;
static unsigned running;
// Lanes take their turns in the order of their numbers with these bits turned over.
static unsigned turned, last_turn;
static Simulated* simulated;
static const Function* running_function;
static void** running_arguments;
static std::mutex computing;  // One kernel at a time: its position is a global.

asm(R"(
    .text
    .local simulated_switch
simulated_switch:            # (where this one's place goes, the other's place)
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
extern "C" void simulated_switch(void** from, void* to);

static void go_on(void** from, unsigned thread) {
    running = thread;
    simulated->thread.x = thread;
    simulated_switch(from, places_to_go_on[thread]);
}

// Goes on with the next lane, or, where that one waits too, with what the scheduler finds.
static void leave(Wants what) {
    const unsigned me = running, turn = me % 32 ^ turned, next = me / 32 * 32 + ((turn + 1) ^ turned);
    wants[me] = what;
    if (turn != last_turn && wants[next] == NOTHING) go_on(&places_to_go_on[me], next);
    else simulated_switch(&places_to_go_on[me], scheduler);
}

static void wait_for_warp() {
    Warp& warp = warps[running / 32];
    if (++warp.arrived < 32) return leave(WARP);
    // The last one: all lanes have come, and the first goes on.
    const unsigned me = running, first = me / 32 * 32;
    warp.arrived = 0;
    warp.round++;
    memset(&wants[first], NOTHING, 32);
    if (first + turned != me) go_on(&places_to_go_on[me], first + turned);
}

static void wait_for_block() { leave(BLOCK); }

static void begin() {
    running_function->run(running_arguments);
    leave(END);
    abort();
}

// A stack ends at a page that nobody may touch.
static void make_stacks() {
    stacks = (char*)mmap(nullptr, (size_t)THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) die("no memory for the stacks of a block");
    for (size_t t = 0; t < THREADS; t++) mprotect(stacks + t * STACK_BYTES, sysconf(_SC_PAGESIZE), PROT_NONE);
}

// Where turns are drawn, from what.
static std::minstd_rand* drawing() {
    static const size_t seed = setting("SIMULATED_GPU_ORDER", 0);
    static std::minstd_rand source(seed);
    return seed ? &source : nullptr;
}

static void run_block(unsigned threads) {
    std::vector<unsigned> warps_in_turn((threads + 31) / 32);
    std::iota(warps_in_turn.begin(), warps_in_turn.end(), 0);
    turned = 0;
    if (auto* source = drawing()) {
        // A warp that is not whole has no lane with another number.
        if (threads % 32 == 0) turned = (*source)() % 32;
        simulated->copies_at_once = (*source)() % 2;
    }
    for (unsigned t = 0; t < threads; t++) {
        // A stack on which `simulated_switch` returns into `begin`, aligned as after a call.
        void** top = (void**)(stacks + (size_t)(t + 1) * STACK_BYTES) - 2;
        top[0] = (void*)begin;
        places_to_go_on[t] = top - 6;
        wants[t] = NOTHING;
    }
    for (;;) {
        if (auto* source = drawing()) std::shuffle(warps_in_turn.begin(), warps_in_turn.end(), *source);
        for (unsigned warp_number : warps_in_turn) {
            const unsigned first = 32 * warp_number, last = std::min(first + 32, threads) - 1;
            last_turn = last - first;
            Warp& warp = warps[first / 32];
            simulated->places = warp.places;
            simulated->round = &warp.round;
            warp.arrived = 0;
            // Until all lanes wait for the block or have ended.
            for (;;) {
                unsigned counts[4] = {}, next = THREADS;
                for (unsigned turn = 0; turn <= last_turn; turn++) {
                    const unsigned t = first + (turn ^ turned);
                    counts[wants[t]]++;
                    if (wants[t] == NOTHING && next == THREADS) next = t;
                }
                if (counts[NOTHING]) {
                    go_on(&scheduler, next);
                    continue;
                }
                if (counts[WARP]) die("%s: lanes wait for their warp, of which others wait for the block or have ended", running_function->name.c_str());
                break;
            }
        }
        // Now all that have not ended wait for the block.
        bool ended = true;
        for (unsigned t = 0; t < threads; t++) {
            if (wants[t] == END) continue;
            wants[t] = NOTHING;
            ended = false;
        }
        if (ended) return;
    }
}

EXPORT int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads, unsigned threads_y,
                          unsigned threads_z, unsigned shared, Stream* stream, void** arguments, void**) {
    if (!grid_x || !grid_y || !grid_z || !threads || threads_y != 1 || threads_z != 1 || threads > THREADS) return INVALID_VALUE;
    if (grid_y > 65535 || grid_z > 65535 || shared > function->shared_max) return INVALID_VALUE;
    auto words = std::make_shared<std::vector<uint64_t>>();
    for (size_t i = 0; i < function->sizes.size(); i++) {
        uint64_t word = 0;
        memcpy(&word, arguments[i], function->sizes[i]);
        words->push_back(word);
        if (function->sizes[i] != 8) continue;
        if (Context* device = device_of(word); device && device != stream->device)
            die("%s: argument %zu is memory of another device", function->name.c_str(), i);
    }
    stream->put([=] {
        std::lock_guard<std::mutex> locked(computing);
        static std::vector<unsigned char> memory((227 << 10) + 256);
        if (!stacks) make_stacks();
        std::vector<void*> pointers;
        for (uint64_t& word : *words) pointers.push_back(&word);
        simulated = function->module->simulated;
        unsigned char* aligned = memory.data() + (256 - (uint64_t)memory.data() % 256);
        *simulated = {{}, {}, {threads, 1, 1}, {grid_x, grid_y, grid_z}, aligned, shared, false, nullptr, nullptr, wait_for_warp, wait_for_block};
        running_function = function;
        running_arguments = pointers.data();
        const uint64_t blocks = (uint64_t)grid_x * grid_y * grid_z;
        const uint64_t begin = drawing() ? (*drawing())() % blocks : 0;
        const bool backwards = drawing() && (*drawing())() % 2;
        for (uint64_t i = 0; i < blocks; i++) {
            const uint64_t block = (begin + (backwards ? blocks - i : i)) % blocks;
            simulated->block = {unsigned(block % grid_x), unsigned(block / grid_x % grid_y), unsigned(block / grid_x / grid_y)};
            memset(aligned, 0xff, shared);
            run_block(threads);
        }
    });
    return SUCCESS;
}

// ---- Words ----

EXPORT int cuGetErrorString(int code, const char** text) {
    switch (code) {
    case SUCCESS: *text = "no error"; break;
    case INVALID_VALUE: *text = "invalid argument"; break;
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case INVALID_IMAGE: *text = "device kernel image is invalid"; break;
    case INVALID_CONTEXT: *text = "invalid device context"; break;
    case NOT_FOUND: *text = "named symbol not found"; break;
    case NOT_READY: *text = "device not ready"; break;
    default: *text = nullptr; return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORT int cuGetErrorName(int code, const char** text) { return cuGetErrorString(code, text); }
