# Instruction-set levels: each csrc/kernels/<op>/<op>_cpu.cpp is compiled once a level, into the namespace
# pykd::<level>, and csrc/core/cpu_isa.cpp chooses one at run time. <op>_bfloat16_cpu.cpp has levels beyond these, for
# the instructions that few processors have. tests/test_isa_levels.py looks through the symbols.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12)  # no _Float16
    message(FATAL_ERROR "pykd needs g++ 12 or newer on x86-64, found ${CMAKE_CXX_COMPILER_VERSION}: set CXX to one.")
  endif()
  set(PYKD_ISA_LEVELS baseline avx2 avx512)
  set(PYKD_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PYKD_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # The compiler's own AVX-512 header trips over its deliberately undefined vectors.
    list(APPEND PYKD_ISA_FLAGS_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  set(PYKD_BFLOAT16_LEVELS avx512bf16 amx)
  set(PYKD_ISA_FLAGS_avx512bf16 ${PYKD_ISA_FLAGS_avx512} -mavx512bf16 -DPYKD_ISA_AVX512)
  set(PYKD_ISA_FLAGS_amx ${PYKD_ISA_FLAGS_avx512bf16} -mamx-tile -mamx-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(PYKD_ISA_LEVELS baseline)  # NEON is part of it
  set(PYKD_BFLOAT16_LEVELS bf16)
  set(PYKD_ISA_FLAGS_bf16 -march=armv8.2-a+bf16)
else()
  message(FATAL_ERROR "pykd's CPU kernels are written for x86-64 and aarch64, not for ${CMAKE_SYSTEM_PROCESSOR}.")
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # A loop over a few vectors stays one: the call of memcpy that it would become costs more.
  set(PYKD_ISA_FLAGS -fno-tree-loop-distribute-patterns)
endif()

# pykd_isa_levels(OUT PREFIX FLAGS... SOURCES ...): object libraries PREFIX_<level>; OUT gets all their objects.
function(pykd_isa_levels out prefix)
  cmake_parse_arguments(PARSE_ARGV 2 ARG "" "" "FLAGS;SOURCES")
  set(objects)
  set(bfloat16 ${ARG_SOURCES})
  list(FILTER bfloat16 INCLUDE REGEX "_bfloat16_cpu[.]cpp$")
  foreach(level IN LISTS PYKD_ISA_LEVELS PYKD_BFLOAT16_LEVELS)
    string(TOUPPER ${level} LEVEL)
    if(level IN_LIST PYKD_ISA_LEVELS)
      add_library(${prefix}_${level} OBJECT ${ARG_SOURCES})
    else()
      add_library(${prefix}_${level} OBJECT ${bfloat16})
    endif()
    target_compile_definitions(${prefix}_${level} PRIVATE PYKD_ISA=${level} PYKD_ISA_${LEVEL})
    target_compile_options(${prefix}_${level} PRIVATE ${PYKD_STRICT} ${ARG_FLAGS} ${PYKD_ISA_FLAGS} ${PYKD_ISA_FLAGS_${level}})
    list(APPEND objects $<TARGET_OBJECTS:${prefix}_${level}>)
  endforeach()
  set(${out} ${objects} PARENT_SCOPE)
endfunction()
