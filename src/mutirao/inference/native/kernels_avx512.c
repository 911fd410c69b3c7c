#include "kernels.h"

#include "simd_avx512.h"

#define HAS_WIDE_TILE
#define KERNELS kernels_avx512
#define KERNELS_NAME "avx512"
#include "kernels_impl.h"
