# What ctest runs beside the cmocka programs: checks of the tree, and tests of the built program from outside.
# Labels: check (the sources), proto (a running program). Tests of a running program are left out under sanitizers that
# would change its timing (tsan) unless they say otherwise.
find_package(Python3 3.9 COMPONENTS Interpreter)
find_program(NODE node)
# clang-format 14 is the one whose output the tree is written to; another version would disagree with itself.
find_program(CLANG_FORMAT NAMES clang-format-14 clang-format)
find_program(PROMTOOL promtool)
if(ERN_TESTS)
  foreach(tool Python3_EXECUTABLE NODE CLANG_FORMAT PROMTOOL CMOCKA_FOUND)
    if(NOT ${tool})
      message(FATAL_ERROR "the tests need ${tool}, which is missing: run tools/deps.sh build test")
    endif()
  endforeach()
endif()

if(Python3_FOUND)
  add_test(NAME check_layers_self COMMAND ${Python3_EXECUTABLE} tools/check_layers.py --self-test
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  add_test(NAME check_layers COMMAND ${Python3_EXECUTABLE} tools/check_layers.py WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(check_layers_self check_layers PROPERTIES LABELS check TIMEOUT 60)

  # tests/proto/<what>/test_*.py: one ctest entry each, given the program by ERNEST_BIN.
  if(TARGET ernest)
    file(GLOB proto_py CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/proto/*/test_*.py)
    foreach(t ${proto_py})
      get_filename_component(n ${t} NAME_WE)
      add_test(NAME proto_${n} COMMAND ${Python3_EXECUTABLE} ${t} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
      set_tests_properties(proto_${n} PROPERTIES LABELS proto TIMEOUT 900
        ENVIRONMENT "ERNEST_BIN=$<TARGET_FILE:ernest>;ERNEST_SAN=${ERN_SAN};CUDA_VISIBLE_DEVICES=")
    endforeach()
  endif()
endif()

# tests/proto/<what>/run.mjs: the same for node.
if(NODE AND TARGET ernest)
  file(GLOB proto_js CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/proto/*/run.mjs)
  foreach(t ${proto_js})
    get_filename_component(d ${t} DIRECTORY)
    get_filename_component(n ${d} NAME)
    add_test(NAME proto_${n} COMMAND ${NODE} ${t} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(proto_${n} PROPERTIES LABELS proto TIMEOUT 900
      ENVIRONMENT "ERNEST_BIN=$<TARGET_FILE:ernest>;ERNEST_SAN=${ERN_SAN};CUDA_VISIBLE_DEVICES=")
  endforeach()
endif()

if(CLANG_FORMAT)
  execute_process(COMMAND ${CLANG_FORMAT} --version OUTPUT_VARIABLE clang_format_version)
  if(clang_format_version MATCHES "version 14\\.")
    add_test(NAME check_format COMMAND sh tools/check_format.sh ${CLANG_FORMAT} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(check_format PROPERTIES LABELS check TIMEOUT 300)
  elseif(ERN_TESTS)
    string(STRIP "${clang_format_version}" clang_format_version)
    message(FATAL_ERROR "the test of the format needs clang-format 14, and ${CLANG_FORMAT} is: ${clang_format_version}")
  endif()
endif()

# The goldens of the full shapes: `make test-full`. golden_check is the tests' own comparison as a program.
if(CMOCKA_FOUND AND TARGET ernest)
  add_executable(golden_check tools/golden_check.c tests/golden/golden.c)
  target_include_directories(golden_check PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/tests)
  target_link_libraries(golden_check PRIVATE ern_backend)
  target_compile_options(golden_check PRIVATE ${ERN_WARN} -Wno-missing-prototypes)
  add_test(NAME golden_full COMMAND sh tools/test_full.sh $<TARGET_FILE:ernest> $<TARGET_FILE:golden_check>
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(golden_full PROPERTIES LABELS "golden;long" TIMEOUT 3600)
endif()

# The kernels for AMX, their tile instructions emulated, for machines that have AVX-512 VNNI and no AMX.
if(TARGET test_checkkern)
  set(cpu ${CMAKE_SOURCE_DIR}/src/backend/cpu)
  add_library(amx_emulated OBJECT ${cpu}/linear_amx.c ${cpu}/quant_amx.c ${cpu}/attn_amx.c ${cpu}/attn_int8_amx.c)
  target_include_directories(amx_emulated PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_options(amx_emulated PRIVATE -include ${CMAKE_SOURCE_DIR}/tests/kern/amx_emulated.h ${ERN_WARN})
  ern_test(kern test_checkkern_amx ${CMAKE_SOURCE_DIR}/tests/kern/test_checkkern.c $<TARGET_OBJECTS:amx_emulated>)
  target_compile_definitions(test_checkkern_amx PRIVATE AMX_EMULATED)
endif()

# tests/cuda/gpu_*.c: programs for a machine with a GPU (`make gpu-test`), built everywhere so that they stay whole. They
# need no test library. gpu_check holds the kernels themselves and every check_*.c; the others load the plugin.
if(TARGET ern_backend_cuda)
  file(GLOB gpu_programs CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/cuda/gpu_*.c)
  file(GLOB gpu_checks CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/cuda/check_*.c)
  foreach(t ${gpu_programs})
    get_filename_component(n ${t} NAME_WE)
    add_executable(${n} ${t})
    target_include_directories(${n} PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/tests)
    target_link_libraries(${n} PRIVATE ern_backend)
    target_compile_options(${n} PRIVATE ${ERN_WARN} -Wno-missing-prototypes)
  endforeach()
  target_sources(gpu_check PRIVATE ${gpu_checks})
  target_link_libraries(gpu_check PRIVATE ern_backend_cuda)
  set_target_properties(gpu_check PROPERTIES LINKER_LANGUAGE CXX)
  # The same of the library for other GPUs, which runs on any; and gpu_model with its plugin in the other one's place.
  set(sm80_checks ${gpu_checks})
  list(FILTER sm80_checks EXCLUDE REGEX "/check_(a8.*|attn_one|chain).c$")
  add_executable(gpu_check_sm80 ${CMAKE_SOURCE_DIR}/tests/cuda/gpu_check.c ${sm80_checks})
  target_include_directories(gpu_check_sm80 PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/tests)
  target_link_libraries(gpu_check_sm80 PRIVATE ern_backend_cuda_sm80)
  target_compile_options(gpu_check_sm80 PRIVATE ${ERN_WARN} -Wno-missing-prototypes)
  set_target_properties(gpu_check_sm80 PROPERTIES LINKER_LANGUAGE CXX)
  set(sm80 ${CMAKE_BINARY_DIR}/sm80)
  add_custom_command(OUTPUT ${sm80}/gpu_model DEPENDS gpu_model ernest_cuda_sm80 VERBATIM
    COMMAND ${CMAKE_COMMAND} -E make_directory ${sm80}
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:ernest_cuda_sm80> ${sm80}/ernest_cuda.so
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:ernest_cuda_sm80> ${sm80}/ernest_cuda_sm80.so
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:gpu_model> ${sm80}/gpu_model)
  add_custom_target(gpu_model_sm80 ALL DEPENDS ${sm80}/gpu_model)
  add_test(NAME nvcc_refuses COMMAND sh ${CMAKE_SOURCE_DIR}/src/backend/cuda/nvcc.sh none
    echo "ptxas info : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized")
  add_test(NAME nvcc_accepts COMMAND sh ${CMAKE_SOURCE_DIR}/src/backend/cuda/nvcc.sh none echo "ptxas info : all is well")
  set_tests_properties(nvcc_refuses nvcc_accepts PROPERTIES LABELS kern)
  set_tests_properties(nvcc_refuses PROPERTIES PASS_REGULAR_EXPRESSION "wgmma was serialised")
endif()

# The loader must refuse a plugin of another build: one that says it is.
if(TARGET test_backend)
  add_library(other_plugin MODULE ${CMAKE_SOURCE_DIR}/tests/plugin/other_plugin.c)
  target_include_directories(other_plugin PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_options(other_plugin PRIVATE ${ERN_WARN})
  set_target_properties(other_plugin PROPERTIES PREFIX "")
  add_dependencies(test_backend other_plugin)
endif()

# The cpu backend has no fp8 cache, and says what mends that.
if(TARGET ernest AND NOT ERN_FUZZ)
  add_test(NAME kv_fp8_refused COMMAND ernest serve --dry-run --model ${CMAKE_SOURCE_DIR}/models/demo-dense
    --backend cpu --kv-cache-dtype fp8)
  set_tests_properties(kv_fp8_refused PROPERTIES LABELS unit TIMEOUT ${ERN_TIMEOUT} PASS_REGULAR_EXPRESSION
    "^ernest: .*fp8 is for a GPU: give --kv-cache-dtype int8 or bf16")
endif()

# --backend auto where a GPU is whose backend does not take the model: cpu computes, and a line says why. The plugin is
# looked for beside the program, so the program gets a second name beside this one. Which plugin it is depends on the
# GPU, and each of the two has words of its own.
if(TARGET ernest AND NOT ERN_FUZZ)
  set(refusing ${CMAKE_BINARY_DIR}/refusing)
  add_library(refusing_plugin MODULE ${CMAKE_SOURCE_DIR}/tests/plugin/refusing_plugin.c)
  add_library(refusing_driver SHARED ${CMAKE_SOURCE_DIR}/tests/plugin/refusing_driver.c)
  add_library(refusing_plugin_sm80 MODULE ${CMAKE_SOURCE_DIR}/tests/plugin/refusing_plugin.c)
  target_compile_definitions(refusing_plugin PRIVATE WORDS="this GPU takes no model")
  target_compile_definitions(refusing_plugin_sm80 PRIVATE WORDS="this older GPU takes no model")
  foreach(t refusing_plugin refusing_plugin_sm80 refusing_driver)
    target_include_directories(${t} PRIVATE ${CMAKE_SOURCE_DIR}/src)
    target_compile_options(${t} PRIVATE ${ERN_WARN})
    set_target_properties(${t} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${refusing} PREFIX "")
  endforeach()
  set_target_properties(refusing_plugin PROPERTIES OUTPUT_NAME ernest_cuda)
  set_target_properties(refusing_plugin_sm80 PROPERTIES OUTPUT_NAME ernest_cuda_sm80)
  set_target_properties(refusing_driver PROPERTIES OUTPUT_NAME libcuda SUFFIX .so.1)
  add_custom_command(OUTPUT ${refusing}/ernest VERBATIM
    DEPENDS ernest refusing_plugin refusing_plugin_sm80 refusing_driver
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:ernest> ${refusing}/ernest)
  add_custom_target(refusing ALL DEPENDS ${refusing}/ernest)
  set(dry_run ${refusing}/ernest serve --dry-run --model ${CMAKE_SOURCE_DIR}/models/demo-dense)
  add_test(NAME backend_auto_refused COMMAND ${dry_run})
  add_test(NAME backend_cuda_refused COMMAND ${dry_run} --backend cuda)
  set_tests_properties(backend_auto_refused PROPERTIES PASS_REGULAR_EXPRESSION
    "found=cpu why=.this GPU takes no model.*this machine has")
  set_tests_properties(backend_cuda_refused PROPERTIES PASS_REGULAR_EXPRESSION "^ernest: this GPU takes no model")
  set_tests_properties(backend_auto_refused backend_cuda_refused PROPERTIES LABELS unit TIMEOUT ${ERN_TIMEOUT}
    ENVIRONMENT LD_LIBRARY_PATH=${refusing})
  foreach(capability 8.0 8.6 8.9 12.0)
    add_test(NAME backend_of_gpu_${capability} COMMAND ${dry_run} --backend cuda)
    set_tests_properties(backend_of_gpu_${capability} PROPERTIES PASS_REGULAR_EXPRESSION
      "^ernest: this older GPU takes no model" LABELS unit TIMEOUT ${ERN_TIMEOUT}
      ENVIRONMENT "LD_LIBRARY_PATH=${refusing};CAPABILITY=${capability}")
  endforeach()
endif()

# Every combination on every model and backend, where `make test` has them all on one.
if(TARGET test_cache_same)
  add_test(NAME test_cache_same_all COMMAND test_cache_same all WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(test_cache_same_all PROPERTIES LABELS "bitwise;long" TIMEOUT 3600)
endif()

# These hold a whole server and crowds of clients, a door and its gate, or copies that must keep up with an engine: beside
# one another they measure one another.
foreach(t test_cache_same test_server_e2e test_server_said test_http test_engine_door proto_test_crowd proto_test_life proto_clients)
  if(TEST ${t})
    set_tests_properties(${t} PROPERTIES RUN_SERIAL TRUE)
  endif()
endforeach()
