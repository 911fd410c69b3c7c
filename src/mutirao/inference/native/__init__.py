"""The native kernels: C sources, their build, and the engine's binding.

``kernels_impl.h`` holds every kernel, written once over sixteen lanes and compiled for AVX-512,
AVX2 and plain C; ``engine.c`` runs programs, ``stream.c`` reads weights ahead of their use.
"""
