// Eight H100s as NVML shows them, for the tests of `megamm doctor`: $FAULT is what is wrong with GPU 1.
// The functions and their values are those of NVML's interface (docs.nvidia.com/deploy/nvml-api).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, GPU_IS_LOST = 15 };

typedef struct {
  unsigned long long total, free, used;
} Memory;

static int fault(const void *gpu, const char *name) {
  const char *given = getenv("FAULT");
  return given && !strcmp(given, name) && (!gpu || gpu == (const void *)2);
}

int nvmlInitWithFlags(unsigned flags) { return flags ? INVALID_ARGUMENT : SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "an error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
  if (fault(0, "stuck")) pause();
  *count = fault(0, "gone") ? 7 : 8;
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) {
  *gpu = (void *)((size_t)index + 1);
  return fault(*gpu, "lost") ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetUUID(void *gpu, char *text, unsigned size) {
  snprintf(text, size, "GPU-%08zx-0000", (size_t)gpu - 1);
  return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(void *gpu, int uncorrected, int aggregate, unsigned long long *count) {
  if (fault(0, "old")) return NOT_SUPPORTED;
  // Errors of earlier lives and corrected ones are there, but not asked for.
  *count = !uncorrected || aggregate ? 99 : fault(gpu, "ecc") ? 3 : 0;
  return SUCCESS;
}

int nvmlDeviceGetRemappedRows(void *gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  if (fault(0, "old")) return NOT_SUPPORTED;
  *corrected = 1;
  *uncorrected = 1;
  *pending = fault(gpu, "pending") || fault(gpu, "unmapped");
  *failed = fault(gpu, "unmapped");
  return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *reasons) {
  *reasons = fault(gpu, "hot") ? 0x40 | 0x8 : 0x1 | 0x4;
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *gpu, Memory *memory) {
  memory->total = 80ull << 30;
  memory->used = fault(gpu, "held") ? 20ull << 30 : 600ull << 20;
  memory->free = memory->total - memory->used;
  return SUCCESS;
}

int nvmlDeviceGetPersistenceMode(void *gpu, int *mode) {
  *mode = !fault(gpu, "lazy");
  return SUCCESS;
}

int nvmlDeviceGetNvLinkState(void *gpu, unsigned link, int *is_active) {
  if (fault(0, "old") || link >= 18) return INVALID_ARGUMENT;
  *is_active = !(fault(gpu, "link") && link == 4);
  return SUCCESS;
}
