# SPDX-License-Identifier: BSL-1.0
# judge(code output arguments...): has ${COMPILER} look at something with ${FLAGS}, without making an object file.
# What it says comes untranslated and with ASCII quotes, so that tests can look for a message.
set(ENV{LC_ALL} C)
separate_arguments(judge_flags UNIX_COMMAND "${FLAGS}")

function(judge code output)
    execute_process(COMMAND ${COMPILER} ${judge_flags} -fsyntax-only ${ARGN}
        RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
    set(${code} "${result}" PARENT_SCOPE)
    set(${output} "${said}" PARENT_SCOPE)
endfunction()
