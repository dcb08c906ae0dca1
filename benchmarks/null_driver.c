/* A libcuda.so.1 that loads and launches nothing: what Triton's own launchers need of the driver, on a machine without
   one. `observe` sets a function that sees the arguments of each launch, by cuLaunchKernel and by cuLaunchKernelEx. */
#include <stddef.h>
#include <stdint.h>

typedef void (*observer_t)(void* function, const unsigned* sizes, void* stream, void** parameters);

typedef struct {
  unsigned sizes[7]; /* of the grid, of a block, and of shared memory */
  void* stream;
  void* attributes;
  unsigned number_of_attributes;
} launch_config_t;

static observer_t observer;
static uintptr_t handles;
static __thread void* current_context; /* A launch without one fails, as a driver's does. */

void observe(observer_t function) { observer = function; }

static int launch(void* function, const unsigned* sizes, void* stream, void** parameters) {
  if (current_context == NULL) return 201;
  if (observer != NULL) observer(function, sizes, stream, parameters);
  return 0;
}

int cuLaunchKernelEx(const launch_config_t* config, void* function, void** parameters, void** extra) {
  return launch(function, config->sizes, config->stream, parameters);
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** parameters, void** extra) {
  const unsigned sizes[7] = {x, y, z, threads_x, threads_y, threads_z, shared};
  return launch(function, sizes, stream, parameters);
}

static int new_handle(void** handle) {
  *handle = (void*)++handles;
  return 0;
}

int cuModuleLoadData(void** module, const void* image) { return new_handle(module); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return new_handle(function); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return new_handle(context); }

int cuCtxGetCurrent(void** context) {
  *context = current_context;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current_context = context;
  return 0;
}

static int number(int* result, int value) {
  *result = value;
  return 0;
}

int cuCtxGetDevice(int* device) { return number(device, 0); }
int cuDeviceGet(int* device, int ordinal) { return number(device, ordinal); }
int cuDeviceGetCount(int* count) { return number(count, 1); }
int cuDriverGetVersion(int* version) { return number(version, 13000); }
/* The only attributes that matter: the most threads of a block, and the most shared memory of one. */
int cuFuncGetAttribute(int* value, int attribute, void* function) { return number(value, attribute == 0 ? 1024 : 0); }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return number(value, attribute == 97 ? 232448 : 0); }

int cuPointerGetAttribute(void** result, int attribute, void* pointer) {
  *result = pointer;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = "an error";
  return 0;
}

#define DOES_NOTHING(name) \
  int name(void) { return 0; }
DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuOccupancyMaxActiveClusters)
DOES_NOTHING(cuPointerGetAttributes)
DOES_NOTHING(cuTensorMapEncodeIm2col)
DOES_NOTHING(cuTensorMapEncodeTiled)
