# The cuda backend: two static libraries of the room, and the plugins that are made from them: for compute capability
# 9.0, and for all others from 8.0 on (CU_PORTABLE; portable/ has what only other GPUs are to see, and some files stay
# out). Each .cu file is one command of nvcc (by nvcc.sh, which refuses slow code): CMake 3.25 is older than the toolkits
# we build with and would want to know their compiler.
set(CUDAToolkit_NVCC_EXECUTABLE ${NVCC})
find_package(CUDAToolkit REQUIRED)
set(cuda_dir ${CMAKE_SOURCE_DIR}/src/backend/cuda)
set(cuda_flags -std=c++17 -O3 -Werror all-warnings -Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden)

file(GLOB cuda_c CONFIGURE_DEPENDS ${cuda_dir}/*.c)
file(GLOB cuda_cu CONFIGURE_DEPENDS ${cuda_dir}/*.cu)
file(GLOB any_c CONFIGURE_DEPENDS ${cuda_dir}/portable/*.c)
file(GLOB any_cu CONFIGURE_DEPENDS ${cuda_dir}/portable/*.cu)
list(REMOVE_ITEM cuda_c ${cuda_dir}/cu_plugin.c)
foreach(n a8_act attn attn_decode moe pack rows sample)
  list(APPEND any_cu ${cuda_dir}/cu_${n}.cu)
endforeach()
set_target_properties(ern_base ern_model PROPERTIES POSITION_INDEPENDENT_CODE ON)

# A library from C files of `c`, .cu files of `cu` and flags of nvcc (the rest), and its plugin: one symbol leaves that;
# what it brings along of base, model and the CUDA runtime stays its own.
function(ern_cuda library plugin portable c cu)
  set(objects)
  foreach(f ${cu})
    get_filename_component(n ${f} NAME)
    set(o ${CMAKE_BINARY_DIR}/${library}/${n}.o)
    add_custom_command(OUTPUT ${o} DEPENDS ${f} ${cuda_dir}/nvcc.sh DEPFILE ${o}.d VERBATIM COMMENT "nvcc ${n}"
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/${library}
      COMMAND sh ${cuda_dir}/nvcc.sh ${o} ${NVCC} ${cuda_flags} ${ARGN} -DCU_PORTABLE=${portable}
              -I${CMAKE_SOURCE_DIR}/src -MD -MF ${o}.d -c ${f} -o ${o})
    list(APPEND objects ${o})
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  add_library(${library} STATIC ${c} ${objects})
  target_link_libraries(${library} PUBLIC ern_model CUDA::cudart_static)
  target_compile_definitions(${library} PUBLIC CU_PORTABLE=${portable})
  set_target_properties(${library} PROPERTIES POSITION_INDEPENDENT_CODE ON C_VISIBILITY_PRESET hidden
    LINKER_LANGUAGE CXX)
  target_compile_options(${library} PRIVATE ${ERN_WARN})

  add_library(${plugin} MODULE ${cuda_dir}/cu_plugin.c)
  target_link_libraries(${plugin} PRIVATE ${library})
  target_compile_options(${plugin} PRIVATE ${ERN_WARN})
  target_link_options(${plugin} PRIVATE -Wl,--exclude-libs,ALL -Wl,-z,defs)
  set_target_properties(${plugin} PROPERTIES PREFIX "" C_VISIBILITY_PRESET hidden LINKER_LANGUAGE CXX)
  install(TARGETS ${plugin} LIBRARY DESTINATION lib/ernest)
endfunction()

ern_cuda(ern_backend_cuda ernest_cuda 0 "${cuda_c}" "${cuda_cu}" -lineinfo
  -gencode=arch=compute_90a,code=sm_90a)
ern_cuda(ern_backend_cuda_sm80 ernest_cuda_sm80 1 "${cuda_c};${any_c}" "${any_cu}"
  -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80)
