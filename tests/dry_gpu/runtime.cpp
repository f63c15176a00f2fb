// A CUDA runtime without a GPU, to be loaded in front of the real one (LD_PRELOAD).
//
// PyTorch's own CUDA libraries run on top of it unchanged. Device memory is host memory, so copies and
// memsets are carried out. Kernels and the compute calls of cuBLAS and cuDNN are recorded and not run.
// What PyTorch calls and this file does not define is answered by "not supported" (see library.py).
//
// Needs no CUDA headers: the few types below are all that crosses the interface. Built by library.py with
// -DCUDA_VERSION=12010 and the like.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#ifndef CUDA_VERSION
#error "CUDA_VERSION: the version of PyTorch's CUDA runtime, 12010 for 12.1"
#endif

// ---------------------------------------------------------------------------------------------------
// Types of the CUDA runtime.

struct Dim3 { unsigned x, y, z; };

struct LaunchConfig {  // cudaLaunchConfig_t; the driver's CUlaunchConfig differs in the type of `shared` alone
    Dim3 grid, block;
    size_t shared;
    void* stream;
    void* attributes;
    unsigned num_attributes;
};

struct DeviceProp {  // cudaDeviceProp; PyTorch allocates it
    char name[256];
    char uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_per_block;
    int regs_per_block, warp_size;
    size_t pitch;
    int threads_per_block, max_block[3], max_grid[3];
#if CUDA_VERSION < 13000
    int clock_rate;
#endif
    size_t const_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
#if CUDA_VERSION < 13000
    int overlap;
#endif
    int multiprocessors;
#if CUDA_VERSION < 13000
    int timeout;
#endif
    int integrated, map_host;
#if CUDA_VERSION < 13000
    int compute_mode;
    int textures[40];
#else
    int textures[39];
#endif
    size_t surface_alignment;
    int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, engines, unified;
#if CUDA_VERSION < 13000
    int memory_clock;
#endif
    int bus_width, l2_size, l2_persisting, threads_per_multiprocessor, priorities, global_l1, local_l1;
    size_t shared_per_multiprocessor;
    int regs_per_multiprocessor, managed, multi_board, board_group, native_atomics;
#if CUDA_VERSION < 13000
    int double_ratio;
#endif
    int pageable, concurrent_managed, preemption, registered_pointer, cooperative;
#if CUDA_VERSION < 13000
    int cooperative_multi;
#endif
    size_t shared_optin;
    int host_tables, direct_managed, blocks_per_multiprocessor;
};

struct FuncAttributes {  // cudaFuncAttributes, without its reserved end
    size_t shared, constant, local;
    int threads_per_block, regs, ptx_version, binary_version, cache_mode, max_shared;
};

struct PointerAttributes {  // cudaPointerAttributes, without what CUDA 13 adds
    int type, device;
    void *device_pointer, *host_pointer;
};

enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kNotSupported = 801 };
enum { kUnregistered = 0, kHost = 1, kDevice = 2 };  // cudaMemoryType

#define API extern "C" __attribute__((visibility("default")))

// The device that is pretended: an H100 with 80 GiB.
namespace device {
constexpr int kMajor = 9, kMinor = 0, kMultiprocessors = 132, kThreads = 2048, kBlocks = 32;
constexpr int kSharedPerBlock = 48 << 10, kSharedOptin = 227 << 10, kSharedPerMultiprocessor = 228 << 10;
size_t memory() {
    const char* gib = getenv("DRY_GPU_MEMORY_GIB");
    static const size_t bytes = (gib && atof(gib) > 0 ? atof(gib) : 80) * (1ull << 30);
    return bytes;
}
}  // namespace device

// ---------------------------------------------------------------------------------------------------
// State. PyTorch calls from several threads, and before and after this library's static objects live;
// so all state is in one object that is never destroyed.

namespace {

struct State {
    std::recursive_mutex mutex;
    std::map<const void*, std::string> kernels;  // by the address of the host's stub
    std::map<const char*, std::pair<size_t, int>> blocks;  // address -> size, type of memory
    size_t used = 0;
    bool recording = false;
    std::string log;
    void (*on_event)() = nullptr;
    std::set<std::string> reported;
    bool answering = false;  // whether scalars read from the device come from `answers`, 0 if it is empty
    std::vector<int64_t> answers;
};

State& state() {
    static State* s = new State;
    return *s;
}

using Lock = std::lock_guard<std::recursive_mutex>;
thread_local int last_error = kSuccess;
thread_local bool last_was_all = false;  // the last kernel was the reduction of `all`

int fail(int code) { return last_error = code; }

// Adds a line to the log: the event's kind, a tab, the rest.
__attribute__((format(printf, 1, 2))) void record(const char* format, ...) {
    State& s = state();
    void (*on_event)();
    {
        Lock lock(s.mutex);
        if (!s.recording) return;
        char line[8192];
        va_list args;
        va_start(args, format);
        vsnprintf(line, sizeof line, format, args);
        va_end(args);
        s.log.append(line).push_back('\n');
        on_event = s.on_event;
    }
    if (on_event) on_event();  // takes Python's lock, so ours is free by now
}

int type_of(const void* p) {
    State& s = state();
    Lock lock(s.mutex);
    auto it = s.blocks.upper_bound((const char*)p);
    if (it == s.blocks.begin()) return kUnregistered;
    --it;
    return (const char*)p < it->first + it->second.first ? it->second.second : kUnregistered;
}

int allocate(void** p, size_t size, int type) {
    State& s = state();
    Lock lock(s.mutex);
    if (type == kDevice && s.used + size > device::memory()) return fail(kOutOfMemory);
    // Pages of zeros that cost nothing until they are written.
    void* block = mmap(nullptr, size ? size : 1, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return fail(kOutOfMemory);
    s.blocks[(const char*)block] = {size ? size : 1, type};
    if (type == kDevice) s.used += size;
    *p = block;
    return kSuccess;
}

int release(void* p) {
    if (!p) return kSuccess;
    State& s = state();
    Lock lock(s.mutex);
    auto it = s.blocks.find((const char*)p);
    if (it == s.blocks.end()) return fail(kInvalidValue);
    if (it->second.second == kDevice) s.used -= it->second.first;
    munmap(p, it->second.first);
    s.blocks.erase(it);
    return kSuccess;
}

// A copy between any two kinds of memory. A scalar that is read from the device decides which way the
// program goes, and no kernel has computed it: it reads as what dry_gpu_answers says, or as 0, or as 1 if
// it is the result of `all` (nothing is not finite, no assertion fails).
int copy(void* to, const void* from, size_t size, bool is_sync) {
    if (!size) return kSuccess;
    const bool to_device = type_of(to) == kDevice, from_device = type_of(from) == kDevice;
    record("copy\t%s\t%zu", to_device ? (from_device ? "D2D" : "H2D") : (from_device ? "D2H" : "H2H"), size);
    if (is_sync) record("sync\tcudaMemcpy");
    memmove(to, from, size);
    State& s = state();
    Lock lock(s.mutex);
    if (s.answering && from_device && !to_device && size <= 8) {
        int64_t answer = last_was_all;
        if (!s.answers.empty()) {
            answer = s.answers.front();
            s.answers.erase(s.answers.begin());
        }
        memcpy(to, &answer, size);
    }
    return kSuccess;
}

int set(void* p, int value, size_t size) {
    record("memset\t%zu", size);
    memset(p, value, size);
    return kSuccess;
}

int launch(const void* stub, Dim3 grid, Dim3 block, void* stream) {
    State& s = state();
    const char* name;
    {
        Lock lock(s.mutex);
        auto it = s.kernels.find(stub);
        name = it == s.kernels.end() ? "unknown" : it->second.c_str();
    }
    last_was_all = strstr(name, "and_kernel") != nullptr;
    record("kernel\t%s\t%u,%u,%u\t%u,%u,%u\t%p", name, grid.x, grid.y, grid.z, block.x, block.y, block.z, stream);
    return kSuccess;
}

int compute(const char* name) {
    last_was_all = false;
    record("library\t%s", name);
    return 0;
}

int sync(const char* name) {
    record("sync\t%s", name);
    return kSuccess;
}

template <class T>
int give(T* to, T value) {
    if (to) *to = value;
    return kSuccess;
}

int give_handle(void** handle) { return give(handle, calloc(1, 64)); }

int drop_handle(void* handle) {
    free(handle);
    return 0;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------
// Interface to recording.py.

API void dry_gpu_record(int on) {
    State& s = state();
    Lock lock(s.mutex);
    s.recording = on;
}

API size_t dry_gpu_log_size() {
    State& s = state();
    Lock lock(s.mutex);
    return s.log.size();
}

API size_t dry_gpu_read_log(size_t from, char* to, size_t size) {
    State& s = state();
    Lock lock(s.mutex);
    return s.log.copy(to, size, from);
}

API void dry_gpu_clear_log() {
    State& s = state();
    Lock lock(s.mutex);
    s.log.clear();
}

API void dry_gpu_on_event(void (*callback)()) {
    State& s = state();
    Lock lock(s.mutex);
    s.on_event = callback;
}

API void dry_gpu_answers(int on, const int64_t* answers, size_t count) {
    State& s = state();
    Lock lock(s.mutex);
    s.answering = on;
    s.answers.assign(answers, answers + count);
}

API int dry_gpu_unsupported(const char* name, int code) {
    State& s = state();
    Lock lock(s.mutex);
    if (s.reported.insert(name).second) fprintf(stderr, "dry_gpu: %s is not supported\n", name);
    if (!strncmp(name, "cuda", 4)) last_error = code;
    return code;
}

// ---------------------------------------------------------------------------------------------------
// Kernels. Every library of PyTorch registers its own when it is loaded.

namespace {
struct CallConfiguration { Dim3 grid, block; size_t shared; void* stream; };
thread_local std::vector<CallConfiguration> configurations;
}  // namespace

API void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(...) {}
API void __cudaRegisterManagedVar(...) {}
API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, ...) {
    State& s = state();
    Lock lock(s.mutex);
    s.kernels[stub] = name;
}
API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
API int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
    const CallConfiguration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
    return kSuccess;
}
API int __cudaGetKernel(void** kernel, const void* stub) { return give(kernel, (void*)stub); }
API int cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void**, size_t, void* stream) {
    return launch(f, grid, block, stream);
}
API int __cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void**, size_t, void* stream) {
    return launch(f, grid, block, stream);
}
API int cudaLaunchCooperativeKernel(const void* f, Dim3 grid, Dim3 block, void**, size_t, void* stream) {
    return launch(f, grid, block, stream);
}
API int cudaLaunchKernelExC(const LaunchConfig* c, const void* f, void**) {
    return launch(f, c->grid, c->block, c->stream);
}
API int cudaFuncGetAttributes(FuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->threads_per_block = 1024;
    a->regs = 32;
    a->ptx_version = a->binary_version = device::kMajor * 10 + device::kMinor;
    a->max_shared = device::kSharedPerBlock;
    return kSuccess;
}
API int cudaFuncSetAttribute(const void*, int, int) { return kSuccess; }
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads, size_t) {
    return give(count, threads > 0 ? device::kThreads / threads : device::kBlocks);
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* f, int threads, size_t size, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, f, threads, size);
}
API int cudaGetSymbolAddress(void** p, const void*) {
    static char symbol[1 << 16];
    return give(p, (void*)symbol);
}
API int cudaMemcpyToSymbol(...) { return kSuccess; }

// ---------------------------------------------------------------------------------------------------
// The device.

API int cudaGetDeviceCount(int* count) { return give(count, 1); }
API int cudaGetDevice(int* d) { return give(d, 0); }
API int cudaSetDevice(int d) { return d == 0 ? kSuccess : fail(kInvalidDevice); }
API int cudaInitDevice(int, unsigned, unsigned) { return kSuccess; }
API int cudaDeviceCanAccessPeer(int* can, int, int) { return give(can, 0); }
API int cudaDeviceGetPCIBusId(char* id, int size, int) {
    snprintf(id, size, "0000:00:00.0");
    return kSuccess;
}
API int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    give(least, 0);
    return give(greatest, -5);
}
API int cudaDeviceGetDefaultMemPool(void** pool, int) { return give(pool, (void*)nullptr); }
API int cudaDriverGetVersion(int* v) { return give(v, CUDA_VERSION); }
API int cudaRuntimeGetVersion(int* v) { return give(v, CUDA_VERSION); }

API int cudaGetDeviceProperties(DeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Dry GPU");
    p->total_memory = device::memory();
    p->shared_per_block = device::kSharedPerBlock;
    p->regs_per_block = p->regs_per_multiprocessor = 65536;
    p->warp_size = 32;
    p->threads_per_block = p->max_block[0] = p->max_block[1] = 1024;
    p->max_block[2] = 64;
    p->max_grid[0] = 2147483647;
    p->max_grid[1] = p->max_grid[2] = 65535;
    p->major = device::kMajor;
    p->minor = device::kMinor;
    p->texture_alignment = 512;
    p->multiprocessors = device::kMultiprocessors;
    p->concurrent_kernels = p->unified = p->cooperative = p->managed = 1;
    p->l2_size = 50 << 20;
    p->threads_per_multiprocessor = device::kThreads;
    p->shared_per_multiprocessor = device::kSharedPerMultiprocessor;
    p->shared_optin = device::kSharedOptin;
    p->blocks_per_multiprocessor = device::kBlocks;
    return kSuccess;
}
API int cudaGetDeviceProperties_v2(DeviceProp* p, int d) { return cudaGetDeviceProperties(p, d); }

API int cudaDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {  // cudaDeviceAttr
        case 1: return give(value, 1024);  // threads per block
        case 5: return give(value, 2147483647);  // grid, x, y, z
        case 6:
        case 7: return give(value, 65535);
        case 8: return give(value, device::kSharedPerBlock);
        case 10: return give(value, 32);  // warp
        case 12: return give(value, 65536);  // registers per block
        case 16: return give(value, device::kMultiprocessors);
        case 39: return give(value, device::kThreads);
        case 75: return give(value, device::kMajor);
        case 76: return give(value, device::kMinor);
        case 81: return give(value, device::kSharedPerMultiprocessor);
        case 97: return give(value, device::kSharedOptin);
        case 106: return give(value, device::kBlocks);
        default: return give(value, 1);  // "is supported"
    }
}

API const char* cudaGetErrorName(int code) {
    switch (code) {
        case kSuccess: return "cudaSuccess";
        case kInvalidValue: return "cudaErrorInvalidValue";
        case kOutOfMemory: return "cudaErrorMemoryAllocation";
        case kInvalidDevice: return "cudaErrorInvalidDevice";
        case kNotSupported: return "cudaErrorNotSupported";
        default: return "cudaError";
    }
}
API const char* cudaGetErrorString(int code) {
    switch (code) {
        case kSuccess: return "no error";
        case kInvalidValue: return "invalid argument";
        case kOutOfMemory: return "out of memory";
        case kInvalidDevice: return "invalid device ordinal";
        case kNotSupported: return "operation not supported on the dry GPU";
        default: return "error of the dry GPU";
    }
}
API int cudaGetLastError() {
    const int code = last_error;
    last_error = kSuccess;
    return code;
}
API int cudaPeekAtLastError() { return last_error; }

// ---------------------------------------------------------------------------------------------------
// Memory.

API int cudaMalloc(void** p, size_t size) {
    record("malloc\t%zu", size);
    return allocate(p, size, kDevice);
}
API int cudaMallocAsync(void** p, size_t size, void*) { return cudaMalloc(p, size); }
API int cudaMallocManaged(void** p, size_t size, unsigned) { return cudaMalloc(p, size); }
API int cudaFree(void* p) {
    record("free");
    return release(p);
}
API int cudaFreeAsync(void* p, void*) { return cudaFree(p); }
API int cudaHostAlloc(void** p, size_t size, unsigned) { return allocate(p, size, kHost); }
API int cudaMallocHost(void** p, size_t size) { return allocate(p, size, kHost); }
API int cudaFreeHost(void* p) { return release(p); }
API int cudaHostGetDevicePointer(void** p, void* host, unsigned) { return give(p, host); }
API int cudaHostRegister(void* p, size_t size, unsigned) {
    Lock lock(state().mutex);
    state().blocks[(const char*)p] = {size, kHost};
    return kSuccess;
}
API int cudaHostUnregister(void* p) {
    Lock lock(state().mutex);
    state().blocks.erase((const char*)p);
    return kSuccess;
}
API int cudaMemGetInfo(size_t* free, size_t* total) {
    Lock lock(state().mutex);
    give(total, device::memory());
    return give(free, device::memory() - state().used);
}
API int cudaPointerGetAttributes(PointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = type_of(p);
    if (a->type != kUnregistered) a->device_pointer = (void*)p;
    if (a->type != kDevice) a->host_pointer = (void*)p;
    return kSuccess;
}
API int cudaMemcpy(void* to, const void* from, size_t size, int) { return copy(to, from, size, true); }
API int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { return copy(to, from, size, false); }
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) { return copy(to, from, size, false); }
API int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, int, void*) {
    for (size_t row = 0; row < height; row++) memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
    record("copy\t%s\t%zu", type_of(to) == kDevice ? (type_of(from) == kDevice ? "D2D" : "H2D") : "D2H", width * height);
    return kSuccess;
}
API int cudaMemset(void* p, int value, size_t size) { return set(p, value, size); }
API int cudaMemsetAsync(void* p, int value, size_t size, void*) { return set(p, value, size); }
API int cudaMemPoolSetAttribute(void*, int, void*) { return kSuccess; }
API int cudaMemPoolGetAttribute(void*, int, void*) { return kSuccess; }

// ---------------------------------------------------------------------------------------------------
// Streams and events. Everything is done at once and in order.

API int cudaDeviceSynchronize() { return sync("cudaDeviceSynchronize"); }
API int cudaStreamCreate(void** s) { return give_handle(s); }
API int cudaStreamCreateWithFlags(void** s, unsigned) { return give_handle(s); }
API int cudaStreamCreateWithPriority(void** s, unsigned, int) { return give_handle(s); }
API int cudaStreamDestroy(void* s) { return drop_handle(s); }
API int cudaStreamQuery(void*) { return kSuccess; }
API int cudaStreamGetPriority(void*, int* priority) { return give(priority, 0); }
API int cudaStreamSynchronize(void*) { return sync("cudaStreamSynchronize"); }
API int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
API int cudaStreamAddCallback(void* s, void (*f)(void*, int, void*), void* data, unsigned) {
    f(s, kSuccess, data);
    return kSuccess;
}
API int cudaLaunchHostFunc(void*, void (*f)(void*), void* data) {
    f(data);
    return kSuccess;
}
API int cudaStreamIsCapturing(void*, int* status) { return give(status, 0); }
API int cudaStreamGetCaptureInfo(void*, int* status, unsigned long long* id, ...) {
    give(status, 0);
    return give(id, 0ull);
}
API int cudaStreamGetCaptureInfo_v2(void* s, int* status, unsigned long long* id, ...) {
    return cudaStreamGetCaptureInfo(s, status, id);
}
API int cudaStreamGetCaptureInfo_v3(void* s, int* status, unsigned long long* id, ...) {
    return cudaStreamGetCaptureInfo(s, status, id);
}
API int cudaThreadExchangeStreamCaptureMode(int*) { return kSuccess; }
API int cudaEventCreate(void** e) { return give_handle(e); }
API int cudaEventCreateWithFlags(void** e, unsigned) { return give_handle(e); }
API int cudaEventDestroy(void* e) { return drop_handle(e); }
API int cudaEventElapsedTime(float* ms, void*, void*) { return give(ms, 1.f); }
API int cudaEventQuery(void*) { return kSuccess; }
API int cudaEventRecord(void*, void*) { return kSuccess; }
API int cudaEventRecordWithFlags(void*, void*, unsigned) { return kSuccess; }
API int cudaEventSynchronize(void*) { return sync("cudaEventSynchronize"); }
API int cudaProfilerStart() { return kSuccess; }
API int cudaProfilerStop() { return kSuccess; }

// ---------------------------------------------------------------------------------------------------
// The driver. This library bears the name libcuda.so.1, so whoever opens the driver gets it. The kernels that
// PyTorch and Triton compile at run time are loaded and launched here.

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* v) { return give(v, CUDA_VERSION); }
API int cuGetExportTable(const void** table, const void*) {  // NVRTC insists on it
    give(table, (const void*)nullptr);
    return kNotSupported;
}
API int cuDeviceGetCount(int* count) { return give(count, 1); }
API int cuDeviceGet(int* d, int) { return give(d, 0); }
API int cuDeviceGetAttribute(int* value, int attribute, int d) { return cudaDeviceGetAttribute(value, attribute, d); }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    give(flags, 0u);
    return give(active, 1);
}
API int cuDevicePrimaryCtxRetain(void** context, int) { return give(context, (void*)&cuInit); }
API int cuCtxGetCurrent(void** context) { return give(context, (void*)&cuInit); }
API int cuCtxSetCurrent(void*) { return 0; }
API int cuCtxGetLimit(size_t* size, int) { return give(size, (size_t)1 << 20); }
API int cuCtxSetLimit(int, size_t) { return 0; }
API int cuMemAlloc_v2(void** p, size_t size) { return cudaMalloc(p, size); }
API int cuMemFree_v2(void* p) { return cudaFree(p); }
API int cuMemcpyHtoD_v2(void* to, const void* from, size_t size) { return copy(to, from, size, true); }
API int cuPointerGetAttribute(void* value, int attribute, const void* p) {
    constexpr int kDevicePointer = 3;  // CUpointer_attribute
    if (attribute != kDevicePointer) return dry_gpu_unsupported("cuPointerGetAttribute", kNotSupported);
    if (type_of(p) == kUnregistered) return kInvalidValue;
    return give((const void**)value, p);
}
API int cuGetErrorString(int, const char** text) { return give(text, "error of the dry GPU"); }
API int cuModuleLoadData(void** module, const void*) { return give_handle(module); }
API int cuModuleLoadDataEx(void** module, ...) { return give_handle(module); }
API int cuModuleUnload(void*) { return 0; }
API int cuModuleGetFunction(void** function, void*, const char* name) {
    State& s = state();
    Lock lock(s.mutex);
    give_handle(function);
    s.kernels[*function] = name;
    return 0;
}
API int cuFuncGetAttribute(int* value, int attribute, void*) {
    return give(value, attribute == 0 ? 1024 : 0);  // threads per block; registers, spills, shared memory
}
API int cuFuncSetAttribute(...) { return 0; }
API int cuFuncSetCacheConfig(...) { return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, ...) { return give(count, 1); }
API int cuOccupancyMaxActiveClusters(int* count, void*, const LaunchConfig* c) {
    const unsigned blocks = c->grid.x * c->grid.y * c->grid.z;  // of a cluster, each on a multiprocessor
    return give(count, device::kMultiprocessors / (int)(blocks ? blocks : 1));
}
API int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void* stream, ...) {
    return launch(f, {gx, gy, gz}, {bx, by, bz}, stream);
}
API int cuLaunchKernelEx(const LaunchConfig* c, void* f, void**, void**) {
    return launch(f, c->grid, c->block, c->stream);
}
API int cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long, int* result) {
    give(f, dlsym(RTLD_DEFAULT, name));
    return give(result, f && *f ? 0 : 1);  // found, not found
}
API int cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long flags, int* result) {
    return cudaGetDriverEntryPoint(name, f, flags, result);
}

// ---------------------------------------------------------------------------------------------------
// cuBLAS: a handle that nobody reads, and each product as one launch.

#define COMPUTE(name) API int name(...) { return compute(#name); }
#define IGNORE(name) API int name(...) { return 0; }

API int cublasCreate_v2(void** handle) { return give_handle(handle); }
API int cublasDestroy_v2(void* handle) { return drop_handle(handle); }
API int cublasGetMathMode(void*, int* mode) { return give(mode, 0); }
API int cublasGetPointerMode_v2(void*, int* mode) { return give(mode, 0); }
IGNORE(cublasSetMathMode) IGNORE(cublasSetPointerMode_v2) IGNORE(cublasSetStream_v2) IGNORE(cublasSetWorkspace_v2)
#define FOR_TYPES(suffix) \
    COMPUTE(cublasS##suffix) COMPUTE(cublasD##suffix) COMPUTE(cublasC##suffix) COMPUTE(cublasZ##suffix)
FOR_TYPES(gemm_v2) FOR_TYPES(gemmBatched) FOR_TYPES(gemmStridedBatched) FOR_TYPES(gemv_v2) FOR_TYPES(trsm_v2) FOR_TYPES(trsmBatched)
COMPUTE(cublasSgemmEx) COMPUTE(cublasGemmEx) COMPUTE(cublasGemmBatchedEx) COMPUTE(cublasGemmStridedBatchedEx)
COMPUTE(cublasSdot_v2) COMPUTE(cublasDdot_v2) COMPUTE(cublasCdotc_v2) COMPUTE(cublasCdotu_v2) COMPUTE(cublasZdotc_v2)
COMPUTE(cublasZdotu_v2) COMPUTE(cublasDotEx)

API int cublasLtMatmulDescCreate(void** d, ...) { return give_handle(d); }
API int cublasLtMatmulPreferenceCreate(void** d) { return give_handle(d); }
API int cublasLtMatrixLayoutCreate(void** d, ...) { return give_handle(d); }
API int cublasLtMatmulDescDestroy(void* d) { return drop_handle(d); }
API int cublasLtMatmulPreferenceDestroy(void* d) { return drop_handle(d); }
API int cublasLtMatrixLayoutDestroy(void* d) { return drop_handle(d); }
IGNORE(cublasLtMatmulDescSetAttribute) IGNORE(cublasLtMatmulPreferenceSetAttribute) IGNORE(cublasLtMatrixLayoutSetAttribute)
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int requested, void* results, int* found) {
    memset(results, 0, 96 * (requested > 0));  // one result: no workspace, success
    return give(found, 1);
}
COMPUTE(cublasLtMatmul)

// ---------------------------------------------------------------------------------------------------
// cuDNN. The descriptors of tensors and the like are the real ones, which check what they are given.
// Each batch norm and each execution of a graph (a convolution) is one launch.

API int cudnnCreate(void** handle) { return give_handle(handle); }
API int cudnnDestroy(void* handle) { return drop_handle(handle); }
API int cudnnSetStream(void*, void*) { return 0; }
API int cudnnGetStream(void*, void** s) { return give(s, (void*)nullptr); }

COMPUTE(cudnnBatchNormalizationForwardInference)
COMPUTE(cudnnBatchNormalizationForwardTrainingEx)
COMPUTE(cudnnBatchNormalizationBackwardEx)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, size_t* size) {
    return give(size, (size_t)256);
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* size) {
    return give(size, (size_t)256);
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
    return give(size, (size_t)256);
}

// The graph interface, as much of it as PyTorch's convolutions use: any graph has one engine, which needs
// no workspace. A descriptor remembers its type and, in a plan, what kind of operation it came from.
namespace {
enum { kEngineConfig = 3, kPlan = 5, kFirstOperation = 10, kConvolution = 10, kBackwardFilter = 11, kBackwardData = 12 };
enum { kHeuristicResults = 202, kTypeInt64 = 3, kTypeDescriptor = 15 };
struct Descriptor { int type; const char* operation; };
}  // namespace

API int cudnnBackendCreateDescriptor(int type, Descriptor** d) {
    const char* operation = type == kConvolution ? "cudnnConvolutionForward"
                            : type == kBackwardFilter ? "cudnnConvolutionBackwardFilter"
                            : type == kBackwardData ? "cudnnConvolutionBackwardData" : nullptr;
    return give(d, new Descriptor{type, operation});
}
API int cudnnBackendDestroyDescriptor(Descriptor* d) {
    delete d;
    return 0;
}
API int cudnnBackendInitialize(Descriptor*) { return 0; }
API int cudnnBackendFinalize(Descriptor*) { return 0; }
API int cudnnBackendSetAttribute(Descriptor* d, int, int type, int64_t count, const void* elements) {
    if (type == kTypeDescriptor)  // graph <- operation, engine <- graph, ...
        for (int64_t i = 0; i < count; i++) {
            const Descriptor* part = ((Descriptor* const*)elements)[i];
            if (part && part->operation && !d->operation) d->operation = part->operation;
        }
    return 0;
}
API int cudnnBackendGetAttribute(Descriptor* d, int name, int type, int64_t requested, int64_t* count, void* elements) {
    give(count, (int64_t)0);
    if (name == kHeuristicResults) {
        give(count, (int64_t)1);
        if (elements && requested > 0) ((Descriptor**)elements)[0]->operation = d->operation;
    } else if (type == kTypeInt64 && elements && requested == 1) {
        *(int64_t*)elements = 0;
        give(count, (int64_t)1);
    }
    return 0;
}
API int cudnnBackendExecute(void*, Descriptor* plan, Descriptor*) {
    return compute(plan->operation ? plan->operation : "cudnnBackendExecute");
}
