#include "kernels.h"

#include "simd_avx2.h"

#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#include "kernels_impl.h"
