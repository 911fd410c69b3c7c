#include "kernels.h"

#include "simd_scalar.h"

#define ONE_TILE_FOR_ALL
#define KERNELS kernels_scalar
#define KERNELS_NAME "scalar"
#include "kernels_impl.h"
