# The engine without torch: libpykd.so (the C API of csrc/runtime/pykd.h), the program pykd-run, which needs no library
# of pykd's, and the Python module pykd._runtime. setup.py says where pybind11 is: PYKD_PYBIND11_INCLUDE.
#
# CUDA's runtime is linked statically: where there is no CUDA, a program starts all the same and has no device. For
# another processor than this one PYKD_CUDART_STATIC says where that library is.
find_package(Threads REQUIRED)

set(reason "${PYKD_CUDA_REASON}")
if(reason STREQUAL "")
  if(NOT CMAKE_CROSSCOMPILING)
    find_library(PYKD_CUDART_STATIC cudart_static HINTS ${CUDAToolkit_LIBRARY_DIR})
  endif()
  if(NOT PYKD_CUDART_STATIC)
    set(reason "no libcudart_static.a for ${CMAKE_SYSTEM_PROCESSOR} was found: PYKD_CUDART_STATIC may name it")
  endif()
endif()
pykd_say_cuda("the engine" "${reason}")

add_library(engine OBJECT ${PYKD_ENGINE})
target_compile_options(engine PRIVATE ${PYKD_STRICT})
target_include_directories(engine SYSTEM PRIVATE ${PYKD_JSON_INCLUDE})
add_library(kernels STATIC ${PYKD_KERNEL_OBJECTS} $<TARGET_OBJECTS:core>)  # of which the engine takes what it calls
if(reason STREQUAL "")
  target_sources(engine PRIVATE ${PYKD_ENGINE_CUDA})
  target_compile_definitions(engine PRIVATE PYKD_WITH_CUDA=1)
  target_include_directories(engine SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_sources(kernels PRIVATE ${PYKD_CUDA_OBJECTS})
  target_link_libraries(kernels PRIVATE ${PYKD_CUDART_STATIC} ${CMAKE_DL_LIBS} rt)
else()
  target_compile_definitions(engine PRIVATE PYKD_WITH_CUDA=0 "PYKD_CUDA_REASON=\"${reason}\"")
endif()

add_library(pykd SHARED $<TARGET_OBJECTS:engine>)
set_target_properties(pykd PROPERTIES SOVERSION 0)
file(WRITE ${CMAKE_BINARY_DIR}/exported "{ global: pykd_*; local: *; };\n")
target_link_options(pykd PRIVATE -Wl,--version-script=${CMAKE_BINARY_DIR}/exported)
add_executable(pykd-run csrc/runtime/pykd_run.cpp $<TARGET_OBJECTS:engine>)
target_compile_options(pykd-run PRIVATE ${PYKD_STRICT})
set(made pykd pykd-run)

if(PYKD_RUNTIME)
  install(TARGETS pykd pykd-run)
  install(FILES csrc/runtime/pykd.h TYPE INCLUDE)
else()
  set_target_properties(pykd pykd-run PROPERTIES EXCLUDE_FROM_ALL ON)
  add_library(_runtime MODULE csrc/runtime/module.cpp $<TARGET_OBJECTS:engine>)
  set_target_properties(_runtime PROPERTIES PREFIX "" SUFFIX ${PYKD_SUFFIX} LIBRARY_OUTPUT_DIRECTORY ${PYKD_OUTPUT})
  target_compile_options(_runtime PRIVATE -fvisibility=hidden -Wall -Wextra
    -ffile-prefix-map=${PYKD_PYBIND11_INCLUDE}/= -ffile-prefix-map=${PYKD_PYTHON_INCLUDE}/=)
  target_include_directories(_runtime SYSTEM PRIVATE ${PYKD_PYBIND11_INCLUDE} ${PYKD_PYTHON_INCLUDE})
  list(APPEND made _runtime)
endif()
foreach(target IN LISTS made)
  target_link_libraries(${target} PRIVATE kernels Threads::Threads)
  # No name of CUDA's runtime is offered: torch has another one in the same process.
  target_link_options(${target} PRIVATE -s -Wl,--as-needed,--exclude-libs,ALL)
endforeach()
