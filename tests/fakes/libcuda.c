// A libcuda.so.1 for tests without a GPU: contexts, modules, tensor maps, memory and launches as far as jit/ uses them. It checks what CUDA
// checks (a function is launched under its own context, a cubin is an ELF file, maps are aligned, captures forbid things) and counts what was
// asked of it. Launches expect the leading 10 addresses of the parameters to be `fake_step` apart and to start at the stream, which a torn
// parameter block breaks; when `fake_maps_at` is set, also tensor maps of the first three there, and counters of that stream alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

int fake_version = 13000, fake_init_status = 0, fake_launch_status = 0, fake_sync_status = 0, fake_capturing = 0, fake_bad_loads = 0;
int fake_launches = 0, fake_loads = 0, fake_torn = 0, fake_syncs = 0, fake_retains = 0, fake_shared = 0, fake_refused = 0, fake_last_device = -1;
int fake_step = 1, fake_maps_at = 0, fake_counters_at = 0, fake_stream_generation = 0, fake_alloc_status = 0;
int fake_encodes = 0, fake_moves = 0, fake_allocs = 0, fake_alloc_device = -1, fake_forbidden = 0, fake_cleared_unready = 0;
unsigned long long fake_counters = 0;
unsigned fake_grid[3], fake_block[3], fake_launch_shared;
static __thread void* stack[16];
static __thread int depth = 0;

#define CONTEXT(device) ((void*)(0x1000UL + (device)))
#define OF_CONTEXT(base, context) ((void*)((base) + ((unsigned long)(context) & 0xf)))

int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, void* status) {
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW), name);
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
int cuInit(unsigned flags) { return fake_init_status; }
int cuDriverGetVersion(int* version) { *version = fake_version; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int length, int device) { strncpy(name, "Fake GPU", length); return 0; }
int cuDeviceTotalMem(size_t* bytes, int device) { *bytes = 1 << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 16 ? 108 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { fake_retains++; *context = CONTEXT(device); return 0; }
int cuCtxGetCurrent(void** context) { *context = depth ? stack[depth - 1] : 0; return 0; }
int cuCtxSetCurrent(void* context) { if (!depth) depth = 1; stack[depth - 1] = context; return 0; }
int cuCtxPushCurrent(void* context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent(void** context) { if (!depth) return 201; depth--; if (context) *context = stack[depth]; return 0; }
int cuModuleLoadData(void** module, const char* image) {
  if (!depth) return 201;
  fake_loads++;
  if (memcmp(image, "\x7f" "ELF", 4) || fake_bad_loads > 0) { fake_bad_loads--; return 200; }
  *module = OF_CONTEXT(0x2000UL, stack[depth - 1]);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = OF_CONTEXT(0x3000UL, module); return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { if (attribute == 8) fake_shared = value; return 0; }
int cuGetErrorName(int error, const char** name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : error == 200 ? "CUDA_ERROR_INVALID_IMAGE" : error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
        : error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
  return 0;
}
int cuGetErrorString(int error, const char** text) { *text = "what happened"; return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = fake_capturing; return 0; }
int cuStreamSynchronize(void* stream) {
  if (stream == (void*)0x77) fake_cleared_unready = 0; else fake_syncs++;
  return fake_sync_status;
}

// Every thread has its own stream behind handle 2, and a handle that was destroyed comes back with the next generation.
int cuStreamGetId(void* stream, unsigned long long* id) {
  static __thread char mine;
  if (!depth) return 201;
  *id = stream == (void*)2 ? (unsigned long)&mine : (unsigned long)stream + 1000000UL * fake_stream_generation;
  return 0;
}

// While anything is captured in the default mode, memory is only given to threads that asked for the relaxed one.
static __thread int capture_mode = 0;
int cuThreadExchangeStreamCaptureMode(int* mode) { int before = capture_mode; capture_mode = *mode; *mode = before; return 0; }
static int forbidden(void) { int no = fake_capturing && capture_mode != 2; fake_forbidden += no; return no; }
int cuMemAlloc(unsigned long long* address, size_t bytes) {
  if (!depth) return 201;
  if (forbidden()) return 900;
  if (fake_alloc_status) return fake_alloc_status;
  *address = (unsigned long)memset(malloc(bytes), 0x55, bytes);
  fake_alloc_device = (unsigned long)stack[depth - 1] & 0xf;
  fake_allocs++;
  return 0;
}
int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void* stream) {
  if (stream != (void*)0x77) { fake_forbidden++; return 900; }
  memset((void*)address, value, bytes);
  fake_cleared_unready = 1;
  return 0;
}
int cuMemcpyDtoH(void* to, unsigned long long from, size_t bytes) {
  if (!depth || forbidden()) return 201;
  memcpy(to, (void*)from, bytes);
  return 0;
}
int cuMemsetD32(unsigned long long address, unsigned value, size_t count) {
  if (!depth || forbidden()) return 201;
  for (size_t i = 0; i < count; i++) ((unsigned*)address)[i] = value;
  return 0;
}
int cuCtxSynchronize(void) {
  if (!depth) return 201;
  fake_syncs++;
  return fake_sync_status;
}
int cuStreamCreate(void** stream, unsigned flags) {
  if (flags != 1) fake_forbidden++;  // a blocking stream waits for the default stream, which waits for captures
  *stream = (void*)0x77;
  return forbidden() ? 900 : 0;
}
int cuStreamDestroy(void* stream) { return 0; }

typedef struct {
  unsigned long address, strides[4];
  unsigned sizes[5], box[5], steps[5], type, rank, interleave, swizzle, promotion, fill;
} Map;
_Static_assert(sizeof(Map) <= 128, "a tensor map has 128 bytes");

int cuTensorMapEncodeTiled(Map* map, int type, unsigned rank, void* address, const unsigned long* sizes, const unsigned long* strides,
                           const unsigned* box, const unsigned* steps, int interleave, int swizzle, int promotion, int fill) {
  if (!depth) return 201;
  if ((unsigned long)map % 64 || (unsigned long)address % 16 || !address || (rank != 4 && rank != 5)) return 1;
  for (unsigned i = 0; i + 1 < rank; i++) if (strides[i] % 16 || strides[i] >> 40) return 1;
  for (unsigned i = 0; i < rank; i++) if (!sizes[i] || sizes[i] >> 32 || !box[i] || box[i] > 256) return 1;
  *map = (Map){(unsigned long)address, .type = type, .rank = rank, .interleave = interleave, .swizzle = swizzle, .promotion = promotion, .fill = fill};
  for (unsigned i = 0; i < rank; i++) map->sizes[i] = sizes[i], map->box[i] = box[i], map->steps[i] = steps[i];
  memcpy(map->strides, strides, (rank - 1) * sizeof *strides);
  fake_encodes++;
  return 0;
}
int cuTensorMapReplaceAddress(Map* map, void* address) {
  if (!depth) return 201;
  if ((unsigned long)map % 64 || (unsigned long)address % 16 || !address) return 1;
  map->address = (unsigned long)address;
  __atomic_add_fetch(&fake_moves, 1, __ATOMIC_RELAXED);
  return 0;
}

// Whether these counters are the ones that this stream had before, and nobody else's; those of a captured launch are new.
static int counters_are_right(unsigned long long counters, unsigned long stream) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static unsigned long long seen[4096], owner[4096];
  static int count = 0;
  unsigned long long id = 0;
  int known = -1, right = 1;
  if (stream > 1) cuStreamGetId((void*)stream, &id);
  pthread_mutex_lock(&lock);
  for (int i = 0; i < count; i++) {
    if (seen[i] == counters) { known = i; right = !fake_capturing && owner[i] == id; }
    else if (owner[i] == id && !fake_capturing) right = 0;
  }
  if (known < 0 && count < 4096) { seen[count] = counters; owner[count++] = fake_capturing ? ~0ULL : id; }
  pthread_mutex_unlock(&lock);
  return right && ((int*)counters)[0] == 0 && ((int*)counters)[1] == 0 && !fake_cleared_unready;
}

typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned attribute_count; } Config;

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  if (!depth) { fake_refused++; return 201; }
  if (OF_CONTEXT(0x3000UL, stack[depth - 1]) != function) { fake_refused++; return 400; }
  if (fake_launch_status) return fake_launch_status;
  const unsigned long* pointers = arguments[0];
  int torn = 0;
  for (int i = 0; i < 10 && !torn; i++) {
    torn = pointers[i] != (unsigned long)config->stream + i * fake_step;
    sched_yield();
  }
  for (int i = 0; i < 3 && fake_maps_at; i++) torn |= ((const Map*)((const char*)pointers + fake_maps_at + 128 * i))->address != pointers[i];
  if (fake_counters_at) {
    fake_counters = *(const unsigned long long*)((const char*)pointers + fake_counters_at);
    torn |= !counters_are_right(fake_counters, (unsigned long)config->stream);
  }
  if (torn) __atomic_add_fetch(&fake_torn, 1, __ATOMIC_RELAXED);
  memcpy(fake_grid, config->grid, sizeof fake_grid);
  memcpy(fake_block, config->block, sizeof fake_block);
  fake_launch_shared = config->shared;
  fake_last_device = (unsigned long)function & 0xf;
  __atomic_add_fetch(&fake_launches, 1, __ATOMIC_RELAXED);
  return 0;
}
