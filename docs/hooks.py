"""Hooks of MkDocs: the site holds what the documents link to, wherever in the repository it is.

Links in the documents are relative paths in the repository, so that they work in any checkout. A
file outside docs/ that one of them leads to becomes part of the site, at its path in the
repository; README.md is the start page.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)\s#]+")
"""The target of a Markdown link to a file, up to a fragment."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page and every file that is linked to, from page to page."""
    pending = [Path(file.abs_src_path) for file in files.documentation_pages()]
    pending.append(_root(config) / "README.md")
    while pending:
        path = pending.pop()
        uri = _site_uri(path, config)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            linked = _linked_files(path, config)
            pending += [
                target
                for target in linked
                if files.get_file_from_path(_site_uri(target, config)) is None
            ]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    source = Path(page.file.abs_src_path)

    def on_site(link: re.Match[str]) -> str:
        target = _target(source, link[0])
        if files.get_file_from_path(_site_uri(target, config)) is None:
            return link[0]  # MkDocs reports it
        return os.path.relpath(_site_uri(target, config), os.path.dirname(page.file.src_uri))

    return LINK.sub(on_site, markdown)


def _linked_files(page: Path, config: MkDocsConfig) -> Iterator[Path]:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = _target(page, link)
        if target.is_file() and target.is_relative_to(_root(config)):
            yield target


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _site_uri(path: Path, config: MkDocsConfig) -> str:
    """Where a file is on the site: docs/ is its root, as for MkDocs itself."""
    docs = Path(config.docs_dir)
    base = docs if path.is_relative_to(docs) else _root(config)
    return Path(os.path.relpath(path, base)).as_posix()


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
