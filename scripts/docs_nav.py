"""mkdocs hook: puts every page of docs/integrations/ into the navigation, by title."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

SECTION = "Integrations"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    docs = Path(config.docs_dir)
    pages = [path.relative_to(docs).as_posix() for path in sorted((docs / "integrations").glob("*.md"))]
    nav = [{SECTION: pages} if SECTION in entry else entry for entry in config.nav]
    config.nav = [entry for entry in nav if entry != {SECTION: []}]
    return config
