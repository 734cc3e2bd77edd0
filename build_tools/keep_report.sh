#!/bin/sh
# Runs a compiler and keeps its messages as <object>.log: keep_report.sh nvcc ... -o <object> ...
# They are shown if it fails.
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" > "$object.log" 2>&1 || { status=$?; cat "$object.log" >&2; rm -f "$object"; exit $status; }
