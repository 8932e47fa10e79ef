# Results are reproducible to the bit only if every operation is rounded separately, following IEEE 754. Flags from outside
# (CXXFLAGS, LDFLAGS, CMAKE_ARGS) that change this are overridden by the ones here, which follow them on the command line,
# for compiling and for linking, where fast-math would make the whole process flush subnormal numbers. If the predefined
# macros show that a flag was not overridden, the configuration fails.
set(EXACT -fno-fast-math -fno-unsafe-math-optimizations -fno-associative-math -fno-reciprocal-math
          -fno-finite-math-only -fsigned-zeros)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND EXACT -ftrapping-math -fno-single-precision-constant)
elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  # (-ftrapping-math has another meaning in Clang: it prevents vectorisation.)
  list(APPEND EXACT -fno-approx-func -fdenormal-fp-math=ieee)
endif()
# Contraction of a * b + c to a fused multiply-add would change the noise (noise.h).
list(APPEND EXACT -ffp-contract=off)
# Only the files of instruction sets (ISAS) may need more than the baseline of the platform.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND EXACT -march=x86-64 -mfpmath=sse)
endif()
foreach(flag ${EXACT})
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:${flag}>)
endforeach()
add_link_options($<$<LINK_LANGUAGE:CXX>:-O3> $<$<LINK_LANGUAGE:CXX>:-fno-fast-math>
                 $<$<LINK_LANGUAGE:CXX>:-fno-unsafe-math-optimizations>)
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-daz-ftz HAS_NO_DAZ_FTZ)
if(HAS_NO_DAZ_FTZ)
  add_link_options($<$<LINK_LANGUAGE:CXX>:-mno-daz-ftz>)
endif()

# Predefined macros that describe floating-point arithmetic and the instruction set.
function(arithmetic_of result)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} ${ARGN} -x c++ -E -dM - INPUT_FILE /dev/null
                  OUTPUT_VARIABLE macros ERROR_VARIABLE problem RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "correctnet: ${CMAKE_CXX_COMPILER} does not work with ${ARGN}: ${problem}")
  endif()
  set(telling "FAST_MATH|FINITE_MATH_ONLY|ASSOCIATIVE_MATH|RECIPROCAL_MATH|NO_SIGNED_ZEROS|NO_TRAPPING_MATH|FP_FAST_FMAF?"
              "|FLT_EVAL_METHOD|SSE2?_MATH|SIZEOF_POINTER|S?SSE[0-9]*[A_]?[0-9]?|AVX[0-9A-Z_]*|FMA4?|F16C|XOP|TBM|BMI2?"
              "|LZCNT|ABM|POPCNT|MOVBE|APX_[A-Z]+|EVEX[0-9]+|GFNI|VAES|VPCLMULQDQ")
  string(CONCAT telling ${telling})
  string(REGEX MATCHALL "#define __(${telling})__ [^\n]*" found "${macros}")
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

string(TOUPPER "${CMAKE_BUILD_TYPE}" build)
separate_arguments(outside NATIVE_COMMAND "${CMAKE_CXX_COMPILER_ARG1} ${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build}}")
arithmetic_of(wanted ${EXACT})
arithmetic_of(found ${outside} ${EXACT})
if(NOT found STREQUAL wanted)
  set(odd ${found})
  list(REMOVE_ITEM odd ${wanted})
  list(REMOVE_ITEM wanted ${found})
  string(REGEX REPLACE "#define |;" " " odd "${odd};${wanted}")
  list(JOIN outside " " outside)
  message(FATAL_ERROR "correctnet: the compiler's flags (${outside}) would change results or ask for a processor that not "
                      "everybody has; take those that define or undefine these macros out of CXXFLAGS, CXX and "
                      "CMAKE_ARGS:${odd}")
endif()
