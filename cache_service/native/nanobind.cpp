// nanobind's own sources: a build may not name files outside the project.
#include <nb_combined.cpp>
