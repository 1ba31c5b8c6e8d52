/* Marks that the files of vector code share. */
#ifndef ERN_BACKEND_CPU_VEC_H
#define ERN_BACKEND_CPU_VEC_H

#define CPU_INLINE static inline __attribute__((always_inline))
/* Small loops over registers must be unrolled whole, or the arrays of registers go to memory. */
#ifdef __clang__
#define CPU_UNROLL _Pragma("unroll")
#else
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

#endif
