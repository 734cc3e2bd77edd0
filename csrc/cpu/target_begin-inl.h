// Opens the target region: what follows, up to target_end-inl.h, is compiled for the instruction set of
// SVDQ_TARGET. Headers of the standard library and of csrc/core are included before, at the platform's
// baseline: their inline functions are shared with code that must run on every processor.
#pragma GCC push_options
#if SVDQ_TARGET == 512
// GCC 12's own AVX-512 headers start "undefined" vectors from themselves.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#elif SVDQ_TARGET == 256
#pragma GCC target("avx2,fma,f16c")
#endif
