"""The TensorFlow of $TFMTSEG_PYTHON as a repository: headers, library, flags."""

_BUILD = """
package(default_visibility = ["//visibility:public"])

exports_files(["record.cc"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"]),  # some have no suffix
    includes = ["include"],
)

cc_import(
    name = "framework",
    shared_library = "libtensorflow_framework.so.2",
)
"""

def _tensorflow_repository(context):
    python = context.os.environ.get("TFMTSEG_PYTHON", "python3")
    script = context.path(Label("//bazel:describe.py"))
    context.path(Label("//:tfmtseg/ops/build.py"))  # a change there counts here
    result = context.execute(
        [python, script],
        environment = {"PYTHONPATH": str(script.dirname.dirname), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if result.return_code != 0:
        fail(("TFMTSEG_PYTHON: %s cannot import tfmtseg. Fix: set it to a Python in whose " +
              "environment tfmtseg is installed.\n%s") % (python, result.stderr))
    facts = json.decode(result.stdout)
    context.symlink(facts["include"], "include")
    context.symlink(facts["framework"], "libtensorflow_framework.so.2")
    context.file("record.cc", facts["record"])
    context.file("flags.bzl", "FLAGS = %r\nINSTRUCTION_SETS = %r\nLINK_FLAGS = %r\n" % (
        facts["flags"],
        facts["instruction_sets"],
        facts["link_flags"],
    ))
    context.file("BUILD", _BUILD)

tensorflow_repository = repository_rule(
    implementation = _tensorflow_repository,
    environ = ["TFMTSEG_PYTHON"],
    local = True,
)
