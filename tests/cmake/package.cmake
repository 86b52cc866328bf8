# SPDX-License-Identifier: BSL-1.0
# cmake -DWAY=find_package|add_subdirectory -DSOURCE_DIR= -DBINARY_DIR= -DWORK_DIR= -DGENERATOR= -DCOMPILER= -DVERSION=
# Builds and runs tests/package/, a project of its own, on an installed vmstate or on vmstate's source.
function(run)
    execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(NOT result STREQUAL "0")
        string(REPLACE ";" " " command "${ARGN}")
        message(NOTICE "${output}")
        message(FATAL_ERROR "${command}: ${result}")
    endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
set(arguments -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_BUILD_TYPE=Debug)
if(WAY STREQUAL "find_package")
    run(${CMAKE_COMMAND} --install ${BINARY_DIR} --prefix ${WORK_DIR}/prefix)
    list(APPEND arguments -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix -DEXPECTED_VERSION=${VERSION})
else()
    list(APPEND arguments -DVMSTATE_SOURCE=${SOURCE_DIR})
endif()
run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE_DIR}/tests/package -B ${WORK_DIR}/build ${arguments})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
run(${WORK_DIR}/build/consumer)
run(${WORK_DIR}/build/json_consumer)
