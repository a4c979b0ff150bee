"""Hydra's hook through which the ``conf`` directories of installed packages are found."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from normlab import plugins


class InstalledConf(SearchPathPlugin):
    """Searched after our own directory, so that nothing installed replaces what is ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in plugins.conf_dirs()[1:]:
            search_path.append("normlab-plugin", f"file://{directory}")
