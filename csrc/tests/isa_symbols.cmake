# Code compiled for a newer instruction set must not be shared with code for older machines: where two objects define the
# same inline function, the linker keeps either one. Every symbol that may be merged must belong to the set's namespace.
#   cmake -DNM=... -DISA=avx2 "-DOBJECTS=a.o;b.o" -P isa_symbols.cmake
string(LENGTH "${ISA}" length)
set(namespace "${length}${ISA}")  # as it stands in a mangled name
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" mergeable "${symbols}")
  foreach(symbol IN LISTS mergeable)
    if(NOT symbol MATCHES "${namespace}")
      list(APPEND shared "${object}: ${symbol}")
    endif()
  endforeach()
endforeach()
if(shared)
  list(JOIN shared "\n" shared)
  message(FATAL_ERROR "Compiled for ${ISA}, but shared with other code:\n${shared}")
endif()
