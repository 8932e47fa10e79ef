#!/bin/sh
# usage: no_shared_symbols.sh NM OBJECT...
#
# Objects compiled for particular instruction sets must not define weak symbols (inline functions and templates with external
# linkage): the linker keeps one copy for the whole program, possibly one that this machine cannot execute.
nm=$1
shift
status=0
for object; do
  weak=$("$nm" --defined-only "$object" | grep -E ' [VvWwu] ')
  if [ -n "$weak" ]; then
    printf '%s defines weak symbols:\n%s\n' "$object" "$weak"
    status=1
  fi
done
exit $status
