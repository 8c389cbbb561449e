# Each *_test.cpp of csrc with all the kernels and the engine, torch left out and the CUDA kernels compiled as C++ over
# csrc/emulation: as released, under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer.
# Cross-compiled, as released alone and without what is large: an emulator is slow.
enable_testing()
find_package(Threads REQUIRED)

if(CMAKE_CROSSCOMPILING)
  set(PYKD_FLAVOURS plain)
  add_compile_definitions(PYKD_EMULATED)
else()
  set(PYKD_FLAVOURS plain address thread)
endif()
set(PYKD_FLAVOUR_plain)
# What may be uninitialised is judged by the released build: the sanitizers' own code confuses the compiler there.
set(sanitized -O1 -g1 -fno-omit-frame-pointer -Wno-maybe-uninitialized)
set(PYKD_FLAVOUR_address ${sanitized} -fsanitize=address,undefined -fno-sanitize-recover=all)
set(PYKD_FLAVOUR_thread ${sanitized} -fsanitize=thread)

# ThreadSanitizer's shadow memory does not fit every Linux's address randomisation, which setarch -R switches off.
execute_process(COMMAND setarch -R true RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
if(result EQUAL 0)
  set(PYKD_RUN_thread setarch -R)
endif()

file(GLOB PYKD_TEST_SOURCES CONFIGURE_DEPENDS csrc/*/*_test.cpp csrc/kernels/*/*_test.cpp)
if(CMAKE_CROSSCOMPILING)
  list(FILTER PYKD_TEST_SOURCES EXCLUDE REGEX "_cuda_test[.]cpp$")  # emulated here as there
endif()
set_source_files_properties(${PYKD_KERNELS_CUDA} ${PYKD_ENGINE_CUDA} PROPERTIES LANGUAGE CXX
  COMPILE_DEFINITIONS PYKD_EMULATE_CUDA)
add_compile_definitions(PYKD_WITH_CUDA=1)

# The kernels as released: tests/test_isa_levels.py reads their symbols.
set(released ${PYKD_ISA_LEVELS} ${PYKD_BFLOAT16_LEVELS})
list(TRANSFORM released PREPEND kernels_plain_)
add_custom_target(isa_levels DEPENDS ${released})

# Of one thread, and of no kernel: ThreadSanitizer has nothing to find.
set(PYKD_SERIAL_TESTS model_file_test npy_test record_test sensors_test trtexec_test)

# Under the sanitizers there are the levels that this processor runs; the others are linked as released.
set(cannot_run)
if(NOT CMAKE_CROSSCOMPILING AND EXISTS /proc/cpuinfo AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  file(STRINGS /proc/cpuinfo has REGEX "^flags" LIMIT_COUNT 1)
  foreach(level_and_flag avx2:avx2 avx512:avx512bw avx512bf16:avx512_bf16 amx:amx_bf16)
    string(REPLACE ":" ";" level_and_flag ${level_and_flag})
    list(GET level_and_flag 0 level)
    list(GET level_and_flag 1 flag)
    if(NOT has MATCHES " ${flag}( |$)")
      list(APPEND cannot_run ${level})
    endif()
  endforeach()
endif()

foreach(flavour IN LISTS PYKD_FLAVOURS)
  set(flags ${PYKD_FLAVOUR_${flavour}})
  if(flavour STREQUAL "thread")  # one level shows how threads share their work; the tests choose it by PYKD_CPU_ISA
    list(APPEND linked_as_released ${PYKD_ISA_LEVELS} ${PYKD_BFLOAT16_LEVELS})
    list(REMOVE_ITEM linked_as_released baseline)
    set(PYKD_ISA_LEVELS baseline)
    set(PYKD_BFLOAT16_LEVELS)
  endif()
  pykd_isa_levels(levels kernels_${flavour} FLAGS ${flags} SOURCES ${PYKD_KERNELS})
  foreach(level IN LISTS linked_as_released)
    list(APPEND levels $<TARGET_OBJECTS:kernels_plain_${level}>)
  endforeach()
  # From the first flavour, which is plain, on:
  list(REMOVE_ITEM PYKD_ISA_LEVELS ${cannot_run})
  list(REMOVE_ITEM PYKD_BFLOAT16_LEVELS ${cannot_run})
  set(linked_as_released ${cannot_run})
  add_library(others_${flavour} OBJECT ${PYKD_CORE} ${PYKD_ENGINE} ${PYKD_ENGINE_CUDA} ${PYKD_KERNELS_CUDA})
  target_include_directories(others_${flavour} SYSTEM PRIVATE ${PYKD_JSON_INCLUDE})
  target_compile_options(others_${flavour} PRIVATE ${PYKD_STRICT} ${flags})
  foreach(test IN LISTS PYKD_TEST_SOURCES)
    get_filename_component(name ${test} NAME_WE)
    if(flavour STREQUAL "thread" AND name IN_LIST PYKD_SERIAL_TESTS)
      continue()
    endif()
    add_executable(${name}_${flavour} ${test} ${levels} $<TARGET_OBJECTS:others_${flavour}>)
    target_compile_options(${name}_${flavour} PRIVATE ${PYKD_STRICT} ${flags})
    target_link_options(${name}_${flavour} PRIVATE ${flags})
    target_link_libraries(${name}_${flavour} PRIVATE Threads::Threads)
    add_test(NAME ${name}_${flavour}
      COMMAND ${CMAKE_CROSSCOMPILING_EMULATOR} ${PYKD_RUN_${flavour}} $<TARGET_FILE:${name}_${flavour}>)
    set_tests_properties(${name}_${flavour} PROPERTIES TIMEOUT 600)
    if(name MATCHES "_cuda_test$")
      set_tests_properties(${name}_${flavour} PROPERTIES COST 60)  # the slow ones first
    endif()
    if(flavour STREQUAL "thread")
      set_tests_properties(${name}_${flavour} PROPERTIES ENVIRONMENT PYKD_CPU_ISA=baseline)
    endif()
  endforeach()
endforeach()
