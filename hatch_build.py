"""Build hook: compiles the C++ kernels; without a compiler the package still installs, on its fallbacks."""

import runpy
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """Put one shared library per instruction set beside ``subspec/kernels/build.py``."""

    def initialize(self, _version, build_data):
        """Compile the kernels; a failure is kept in ``build.json`` for ``subspec doctor``."""
        kernels = Path(self.root, "src", "subspec", "kernels")
        outcome = runpy.run_path(str(kernels / "build.py"))["build"]()
        for level, message in outcome.items():
            if message != "ok":
                self.app.display_warning(f"subspec kernels, {level}: {message}")
        build_data["artifacts"] += ["src/subspec/kernels/*.so", "src/subspec/kernels/build.json"]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
