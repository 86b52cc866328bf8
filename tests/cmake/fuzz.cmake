# SPDX-License-Identifier: BSL-1.0
# cmake -DTARGET= -DSEEDS= -DLIBFUZZER=0|1 -DSECONDS= -DWORK_DIR= -P fuzz.cmake
# A short run of one fuzz target from its seeds (what it finds interesting goes to WORK_DIR), or, without libFuzzer,
# one pass over the seeds.
file(MAKE_DIRECTORY ${WORK_DIR}/corpus)
set(seeds)
if(IS_DIRECTORY ${SEEDS})
    set(seeds ${SEEDS})
endif()
if(LIBFUZZER)
    # -timeout is for an input that never ends, not for a slow machine.
    set(arguments ${WORK_DIR}/corpus ${seeds} -max_total_time=${SECONDS} -timeout=60 -rss_limit_mb=2048
        -artifact_prefix=${WORK_DIR}/ -print_final_stats=1 -verbosity=1)
else()
    set(arguments ${seeds})
endif()
execute_process(COMMAND ${TARGET} ${arguments} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result STREQUAL "0")
    message(NOTICE "${output}")
    message(FATAL_ERROR "${TARGET}: ${result}; the input is in ${WORK_DIR}")
endif()
string(REGEX MATCHALL "(stat::[^\n]*|replayed[^\n]*)" said "${output}")
string(REPLACE ";" "\n" said "${said}")
message(NOTICE "${said}")
