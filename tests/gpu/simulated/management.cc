// libnvidia-ml.so.1 on a machine without a GPU: readings that stay as they are, and the XID that is written to the file
// SIMULATED_GPU_XID (a number; once for each process).
#include <unistd.h>
#include <cstdio>
#include <cstdlib>

#include "simulated_gpu.h"

enum { SUCCESS = 0, NOT_FOUND = 6, TIMEOUT = 10, CRITICAL_XID = 8 };

struct Memory { unsigned version; unsigned long long total, reserved, free, used; };
struct Utilization { unsigned gpu, memory; };
struct Event { void* device; unsigned long long type, data; unsigned instance, compute_instance; };

EXPORT int nvmlInit_v2() { return SUCCESS; }
EXPORT const char* nvmlErrorString(int code) { return code == TIMEOUT ? "timeout" : "an error"; }

EXPORT int nvmlSystemGetDriverVersion(char* text, unsigned length) {
    snprintf(text, length, "580.00");
    return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char* address, void** device) {
    unsigned bus;
    if (sscanf(address, "0000:%x:00.0", &bus) != 1) return NOT_FOUND;
    *device = (void*)(size_t)bus;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(void*, Memory* memory) {
    memory->total = 8ull << 30;
    memory->used = 1ull << 30;
    memory->free = memory->total - memory->used;
    memory->reserved = 0;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetUtilizationRates(void*, Utilization* rates) {
    *rates = {97, 40};
    return SUCCESS;
}

EXPORT int nvmlDeviceGetTemperature(void*, int, unsigned* celsius) {
    *celsius = 64;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) {
    *milliwatts = 512000;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetClockInfo(void*, int, unsigned* megahertz) {
    *megahertz = 1755;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetSupportedEventTypes(void*, unsigned long long* types) {
    *types = CRITICAL_XID;
    return SUCCESS;
}

EXPORT int nvmlEventSetCreate(void** set) {
    *set = new void*(nullptr);
    return SUCCESS;
}
EXPORT int nvmlEventSetFree(void*) { return SUCCESS; }

EXPORT int nvmlDeviceRegisterEvents(void* device, unsigned long long, void** set) {
    *set = device;
    return SUCCESS;
}

EXPORT int nvmlEventSetWait_v2(void** set, Event* event, unsigned milliseconds) {
    static bool told = false;
    usleep(milliseconds * 1000);
    const char* path = getenv("SIMULATED_GPU_XID");
    FILE* file = path && !told ? fopen(path, "r") : nullptr;
    if (!file) return TIMEOUT;
    unsigned long long xid = 0;
    const bool read = fscanf(file, "%llu", &xid) == 1;
    fclose(file);
    if (!read) return TIMEOUT;
    told = true;
    *event = {*set, CRITICAL_XID, xid, 0, 0};
    return SUCCESS;
}
