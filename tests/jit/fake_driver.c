// A libcuda.so.1 for tests without a GPU: contexts, modules and launches as far as jit/driver.py and jit/launch.py use them. It checks what
// CUDA checks (a function is launched under its own context, a cubin is an ELF file) and counts what was asked of it. Launches expect the
// leading 10 addresses of the parameters to be consecutive numbers that start at the stream, which a torn parameter block breaks.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <string.h>

int fake_version = 13000, fake_init_status = 0, fake_launch_status = 0, fake_sync_status = 0, fake_capturing = 0, fake_bad_loads = 0;
int fake_launches = 0, fake_loads = 0, fake_torn = 0, fake_syncs = 0, fake_retains = 0, fake_shared = 0, fake_refused = 0, fake_last_device = -1;
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
        : error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_OTHER";
  return 0;
}
int cuGetErrorString(int error, const char** text) { *text = "what happened"; return 0; }
int cuStreamIsCapturing(void* stream, int* status) { *status = fake_capturing; return 0; }
int cuStreamSynchronize(void* stream) { fake_syncs++; return fake_sync_status; }

typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned attribute_count; } Config;

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  if (!depth) { fake_refused++; return 201; }
  if (OF_CONTEXT(0x3000UL, stack[depth - 1]) != function) { fake_refused++; return 400; }
  if (fake_launch_status) return fake_launch_status;
  const unsigned long* pointers = arguments[0];
  for (int i = 0; i < 10; i++) {
    if (pointers[i] != (unsigned long)config->stream + i) { __atomic_add_fetch(&fake_torn, 1, __ATOMIC_RELAXED); break; }
    sched_yield();
  }
  memcpy(fake_grid, config->grid, sizeof fake_grid);
  memcpy(fake_block, config->block, sizeof fake_block);
  fake_launch_shared = config->shared;
  fake_last_device = (unsigned long)function & 0xf;
  __atomic_add_fetch(&fake_launches, 1, __ATOMIC_RELAXED);
  return 0;
}
