#!/usr/bin/env bash
# Writes autograder.zip for Gradescope: the project and the two scripts that it calls.
# Run from the project's root: bash exercises/teacher/gradescope/make_zip.sh COURSE
set -euo pipefail
course=${1:?give your course\'s number}
folder=$(mktemp -d)
git archive --prefix project/ HEAD | tar -x -C "$folder"
cp exercises/teacher/gradescope/{setup.sh,run_autograder,results.py} "$folder"
echo "$course" > "$folder/course"
rm -f autograder.zip
python3 -m zipfile -c autograder.zip "$folder"/*
rm -r "$folder"
echo autograder.zip
