// Compiles a region of a file for an instruction set that the rest of the program does not assume. Include all headers
// before the region, or their inline functions would be compiled for that set too.
#pragma once

#define DYBIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DYBIT_TARGET_BEGIN(isa) \
  DYBIT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DYBIT_TARGET_END DYBIT_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define DYBIT_TARGET_BEGIN(isa) DYBIT_PRAGMA(GCC push_options) DYBIT_PRAGMA(GCC target(isa))
#define DYBIT_TARGET_END DYBIT_PRAGMA(GCC pop_options)
#else  // MSVC takes intrinsics without being told
#define DYBIT_TARGET_BEGIN(isa)
#define DYBIT_TARGET_END
#endif

// DYBIT_PIN keeps a sum in its vector register (x86). Without it GCC stores every sum in every step of the loop.
#if defined(__GNUC__)
#define DYBIT_INLINE __attribute__((always_inline))
#define DYBIT_NOINLINE __attribute__((noinline))
#define DYBIT_PIN(sum) asm("" : "+v"(sum))
#else
#define DYBIT_INLINE
#define DYBIT_NOINLINE
#define DYBIT_PIN(sum)
#endif
