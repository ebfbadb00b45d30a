import errno
import io
import json
import logging
import random
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from loopback import Answer, FileServer
from rich.console import Console

import timm_lt.models.pretrained as download_module
from timm_lt.models.pretrained import ATTEMPTS, LONGEST_DELAY, cached_name, download
from timm_lt.utils.checks import UsageError

KANG = "https://dl.fbaipublicfiles.com/classifier-balancing/"
PATH = "/models/x.pth"
OLD = random.Random(0).randbytes(100_000)
NEW = random.Random(1).randbytes(120_000)
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
STEP = 30_000


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """The waits between attempts, which take no time."""
    waits = []
    monkeypatch.setattr(download_module, "sleep", waits.append)
    return waits


@pytest.fixture
def server():
    with FileServer({PATH: OLD}) as running:
        yield running


def left(folder):
    """What lies in the cache, without the lock files and with the names' digests cut off."""
    names = [path.name for path in (folder / "timm_lt").iterdir() if path.suffix != ".lock"]
    return sorted(re.sub(r".*\.[0-9a-f]{16}\.pth", "NAME", name) for name in names)


def refused(url, folder, **options):
    with pytest.raises(UsageError) as caught:
        download(url, cache_dir=folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def interrupted(server, folder, monkeypatch, **answer):
    """A download whose first STEP bytes arrive; the next call starts at the second request."""
    server.answers = [Answer(cut=STEP, **answer)]
    with monkeypatch.context() as patch:
        patch.setattr(download_module, "ATTEMPTS", 1)
        return refused(server.url(PATH), folder)


def test_the_name_is_readable_and_tells_equal_basenames_apart():
    names = [
        cached_name(f"{KANG}{folder}/models/resnet50_uniform_e90.pth")
        for folder in ("ImageNet_LT", "iNaturalist18")
    ]
    for name, folder in zip(names, ("ImageNet_LT", "iNaturalist18"), strict=True):
        assert re.fullmatch(folder + r"--models--resnet50_uniform_e90\.[0-9a-f]{16}\.pth", name)
    assert len({name.split(".")[1] for name in names}) == 2


def test_every_difference_between_urls_is_one_between_names():
    urls = [
        "https://a.org/m/x.pth",
        "http://a.org/m/x.pth",
        "https://a.org:8000/m/x.pth",
        "https://b.org/m/x.pth",
        "https://a.org/M/x.pth",
        "https://a.org/m--x.pth",
        "https://a.org/m%2Fx.pth",
        "https://a.org/m/x.pth?v=1",
        "https://a.org/m/x.pth?v=2",
        "https://a.org/other/long/way/m/x.pth",
        "https://a.org/another/long/way/m/x.pth",
        f"https://a.org/{'a' * 300}.pth",
        f"https://a.org/{'a' * 301}.pth",
    ]
    # Some file systems do not tell capitals from small letters.
    assert len({cached_name(url).lower() for url in urls}) == len(urls)


@pytest.mark.parametrize(
    ("end", "suffix"),
    [
        ("x.pth", ".pth"),
        ("x.safetensors", ".safetensors"),
        ("x.pth.tar?download=1", ".tar"),
        ("model.pth/", ".pth"),
        ("checkpoint", ""),
        ("x.a%2F..%2F..%2Fetc", ""),
        ("x.p<th", ""),
        ("x." + "y" * 300, ""),
        ("../../../etc/passwd", ""),
        ("..", ""),
        (".hidden", ""),
        ("-rf", ""),
        ("con.pth", ".pth"),
        ("é ü:*?.pth", ""),
        ("%00%0a.pth", ".pth"),
        ("w" * 300 + ".pth", ".pth"),
        ("", ""),
    ],
)
def test_the_name_is_safe_and_keeps_the_suffix(end, suffix):
    name = cached_name(f"https://example/{end}")
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.[0-9a-f]{16}" + re.escape(suffix), name)
    assert len(name) <= 133


def test_a_file_is_downloaded_once(server, tmp_path, caplog):
    caplog.set_level(logging.INFO, "timm_lt")
    url = server.url(PATH)
    path = download(url, cache_dir=tmp_path)
    assert path == tmp_path / "timm_lt" / cached_name(url)
    assert path.read_bytes() == OLD
    assert left(tmp_path) == ["NAME"]
    assert download(url, cache_dir=str(tmp_path)) == path
    (asked,) = server.requests
    assert asked.headers["Accept-Encoding"] == "identity"
    assert "Range" not in asked.headers
    (record,) = caplog.records
    assert url in record.getMessage()
    assert str(path) in record.getMessage()


def test_a_cached_file_needs_neither_server_nor_lock(tmp_path):
    url = "http://weights.invalid/x.pth"
    path = tmp_path / "timm_lt" / cached_name(url)
    path.parent.mkdir()
    path.write_bytes(OLD)
    assert download(url, cache_dir=tmp_path) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_default_cache_is_timm_s(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    path = download(server.url(PATH))
    assert path.parent == tmp_path / "hub" / "checkpoints" / "timm_lt"


def test_one_basename_at_two_addresses(server, tmp_path):
    server.files = {"/a/models/x.pth": OLD, "/b/models/x.pth": NEW}
    paths = [download(server.url(path), cache_dir=tmp_path) for path in server.files]
    assert [path.read_bytes() for path in paths] == [OLD, NEW]


def test_an_address_may_hold_more_than_ascii(server, tmp_path):
    server.files = {"/%C3%A9%20/x.pth?a=%2F": OLD}
    assert download(server.url("/é /x.pth?a=%2F"), cache_dir=tmp_path).read_bytes() == OLD


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_other_sizes(server, tmp_path, size):
    server.files[PATH] = (OLD * 30)[:size]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == server.files[PATH]


def test_a_file_gets_its_name_after_the_check(server, tmp_path):
    seen = []

    def check(path):
        seen.append((path.read_bytes(), left(tmp_path)))

    download(server.url(PATH), cache_dir=tmp_path, check=check)
    download(server.url(PATH), cache_dir=tmp_path, check=check)
    assert seen == [(OLD, ["NAME.incomplete", "NAME.incomplete.json"])]


@pytest.mark.parametrize("error", [UsageError("wrong digest"), OSError("short"), KeyError("fc")])
def test_a_failed_check_leaves_nothing(server, tmp_path, error):
    def check(_):
        raise error

    with pytest.raises(type(error)) as caught:
        download(server.url(PATH), cache_dir=tmp_path, check=check)
    assert caught.value is error
    assert left(tmp_path) == []
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD


def test_an_interrupted_download_goes_on(server, tmp_path, monkeypatch):
    message = interrupted(server, tmp_path, monkeypatch)
    assert server.url(PATH) in message
    assert "30000 of 100000 bytes" in message
    assert "calling again resumes" in message
    assert left(tmp_path) == ["NAME.incomplete", "NAME.incomplete.json"]
    path = download(server.url(PATH), cache_dir=tmp_path)
    assert path.read_bytes() == OLD
    assert [asked.range for asked in server.requests] == [None, "bytes=30000-"]
    assert [asked.sent for asked in server.requests] == [30_000, 70_000]
    assert left(tmp_path) == ["NAME"]


def test_cuts_are_mended_within_a_call(server, tmp_path, slept):
    server.answers = [Answer(cut=STEP), Answer(status=0), Answer(cut=0), Answer(cut=STEP)]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    starts = [asked.range for asked in server.requests]
    assert starts == [None, "bytes=30000-", "bytes=30000-", "bytes=30000-", "bytes=60000-"]
    assert sum(asked.sent for asked in server.requests) == len(OLD)
    assert slept == [1, 2, 4, 8]


@pytest.mark.parametrize("answer", [Answer(cut=100), Answer(cut=0), Answer(status=0)])
def test_a_file_that_never_completes(server, tmp_path, answer):
    server.default = answer
    message = refused(server.url(PATH), tmp_path)
    assert server.url(PATH) in message
    assert len(server.requests) == ATTEMPTS
    arrived = sum(asked.sent for asked in server.requests)
    assert f"; {arrived} of {'an unknown number of' if answer.cut is None else 100_000}" in message
    assert "NAME" not in left(tmp_path)


@pytest.mark.parametrize("date", [None, DATE])
def test_a_changed_file_is_fetched_whole(server, tmp_path, monkeypatch, date):
    server.etag = None if date else server.etag
    server.last_modified = date
    interrupted(server, tmp_path, monkeypatch)
    server.files[PATH] = NEW
    server.last_modified = date and date.replace("2015", "2016")
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == NEW
    assert server.requests[1].headers["If-Range"] == (
        date or server.requests[1].headers["If-Range"]
    )
    assert [asked.sent for asked in server.requests] == [STEP, len(NEW)]


@pytest.mark.parametrize(("etag", "size"), [('"{}"', len(OLD)), (None, len(NEW))])
def test_nor_does_a_careless_server_splice(server, tmp_path, monkeypatch, etag, size):
    server.default = Answer(if_range=False)
    interrupted(server, tmp_path, monkeypatch)
    server.files[PATH] = NEW[:size]
    server.etag = etag
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == NEW[:size]
    assert [asked.range for asked in server.requests] == [None, "bytes=30000-", None]


def test_a_range_that_was_not_asked_for(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path, monkeypatch)
    server.answers = [Answer(headers={"Content-Range": "bytes 29999-99999/100000"})]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.range for asked in server.requests] == [None, "bytes=30000-", None]


def test_a_server_without_ranges_starts_anew(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path, monkeypatch)
    server.default = Answer(ranges=False)
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.sent for asked in server.requests] == [STEP, len(OLD)]


@pytest.mark.parametrize(
    ("etag", "date", "validator"),
    [(None, None, None), ('W/"{}"', None, None), ('W/"{}"', DATE, DATE)],
)
def test_only_what_names_the_bytes_validates(server, tmp_path, monkeypatch, etag, date, validator):
    server.etag, server.last_modified = etag, date
    message = interrupted(server, tmp_path, monkeypatch)
    assert f"calling again {'resumes' if validator else 'starts anew'}" in message
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert server.requests[1].range == (validator and "bytes=30000-")
    assert server.requests[1].headers.get("If-Range") == validator


def test_a_complete_file_is_recognised(server, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url(PATH), cache_dir=tmp_path, check=interrupt)
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.sent for asked in server.requests] == [len(OLD), 0]
    assert left(tmp_path) == ["NAME"]


def test_a_file_that_became_shorter(server, tmp_path, monkeypatch):
    server.default = Answer(if_range=False)
    interrupted(server, tmp_path, monkeypatch)
    server.files[PATH] = NEW[:STEP]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == NEW[:STEP]
    assert [asked.range for asked in server.requests] == [None, "bytes=30000-", None]


@pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
def test_bytes_of_unknown_origin_are_not_used(server, tmp_path, monkeypatch, record):
    interrupted(server, tmp_path, monkeypatch)
    (path,) = (tmp_path / "timm_lt").glob("*.json")
    path.unlink() if record is None else path.write_text(record)
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert server.requests[1].range is None


def test_the_record_says_what_the_bytes_are(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path, monkeypatch)
    (path,) = (tmp_path / "timm_lt").glob("*.json")
    record = json.loads(path.read_text())
    assert record == {"url": server.url(PATH), "validator": record["validator"], "size": 100_000}


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_without_an_announced_size(server, tmp_path, framing):
    server.default = Answer(framing=framing)
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD


@pytest.mark.parametrize("cut", [0, STEP])
def test_a_broken_chunked_body_is_noticed(server, tmp_path, cut):
    server.answers = [Answer(framing="chunked", cut=cut)]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert server.requests[1].range == ("bytes=30000-" if cut else None)


def test_a_cut_in_a_rest_of_unknown_total(server, tmp_path):
    unknown = {"Content-Range": "bytes 30000-99999/*"}
    server.answers = [
        Answer(framing="chunked", cut=STEP),
        Answer(cut=STEP, headers=unknown),
    ]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.sent for asked in server.requests] == [30_000, 30_000, 40_000]


def test_where_the_protocol_cannot_tell_the_check_decides(server, tmp_path):
    server.answers = [Answer(framing="close", cut=STEP)]

    def check(path):
        assert path.read_bytes() == OLD

    with pytest.raises(AssertionError):
        download(server.url(PATH), cache_dir=tmp_path, check=check)
    assert left(tmp_path) == []
    assert download(server.url(PATH), cache_dir=tmp_path, check=check).read_bytes() == OLD


def test_a_server_that_announces_more_than_it_has(server, tmp_path):
    server.default = Answer(announce=len(OLD) + 1)
    assert server.url(PATH) in refused(server.url(PATH), tmp_path)
    assert "NAME" not in left(tmp_path)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (404, "the address has moved, load a file with pretrained_cfg_overlay=dict(file=...)"),
        (410, "the address has moved, load a file with pretrained_cfg_overlay=dict(file=...)"),
        (403, "access is refused, load a file with pretrained_cfg_overlay=dict(file=...)"),
        (401, "access is refused, load a file with pretrained_cfg_overlay=dict(file=...)"),
        (400, "put the file by hand at "),
        (416, "put the file by hand at "),
        (304, "put the file by hand at "),
        (204, "unexpected HTTP 204"),
        (206, "unexpected HTTP 206"),
    ],
)
def test_a_refusal_is_final(server, tmp_path, status, advice):
    server.default = Answer(status=status)
    message = refused(server.url(PATH), tmp_path)
    assert message.startswith(f"{server.url(PATH)} ")
    assert f"HTTP {status}" in message
    assert advice in message
    assert len(server.requests) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, slept, status):
    server.answers = [Answer(status=status)] * 2
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert slept == [1, 2]


def test_a_busy_server_is_not_asked_for_ever(server, tmp_path, slept):
    server.default = Answer(status=503)
    message = refused(server.url(PATH), tmp_path)
    assert "HTTP 503, Service Unavailable" in message
    assert str(tmp_path / "timm_lt" / cached_name(server.url(PATH))) in message
    assert len(server.requests) == ATTEMPTS
    assert slept == [1, 2, 4, 8]


def test_retry_after_is_honoured_up_to_a_bound(server, tmp_path, slept):
    server.answers = [
        Answer(status=429, headers={"Retry-After": "7"}),
        Answer(status=503, headers={"Retry-After": "0"}),
        Answer(status=503, headers={"Retry-After": DATE}),
        Answer(status=429, headers={"Retry-After": f"{LONGEST_DELAY + 1:.0f}"}),
    ]
    message = refused(server.url(PATH), tmp_path)
    assert slept == [7, 0, 4]
    assert "HTTP 429, Too Many Requests, which asks to wait 61 s" in message
    assert len(server.requests) == 4


def test_a_refused_connection(tmp_path):
    with FileServer({}) as server:
        url = server.url(PATH)
    message = refused(url, tmp_path)
    assert url in message
    assert "refused" in message
    assert f"put the file by hand at {tmp_path / 'timm_lt' / cached_name(url)}" in message


def test_a_name_that_does_not_resolve(tmp_path, monkeypatch):
    def resolve(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    message = refused("http://weights.invalid/x.pth", tmp_path)
    assert "http://weights.invalid/x.pth cannot be reached" in message
    assert "Name or service not known" in message
    assert "put the file by hand at" in message


def test_a_server_that_says_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    server.answers = [Answer(hang=True)]
    message = refused(server.url(PATH), tmp_path)
    assert server.url(PATH) in message
    assert "timed out" in message
    assert len(server.requests) == 1


def test_a_server_that_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    server.answers = [Answer(cut=STEP, hang=True)]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.sent for asked in server.requests] == [30_000, 70_000]


def test_a_redirect_keeps_the_range(server, tmp_path, monkeypatch):
    interrupted(server, tmp_path, monkeypatch)
    server.files["/elsewhere.pth"] = OLD
    server.answers = [Answer(status=302, headers={"Location": "/elsewhere.pth"})]
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD
    assert [asked.path for asked in server.requests] == [PATH, PATH, "/elsewhere.pth"]
    assert server.requests[2].sent == 70_000


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_a_redirect_stays_on_the_web(server, tmp_path, scheme):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    server.default = Answer(status=302, headers={"Location": f"{scheme}://{secret}"})
    message = refused(server.url(PATH), tmp_path)
    assert server.url(PATH) in message
    assert f"{scheme}://{secret}" in message
    assert left(tmp_path) == []


def test_a_redirect_in_circles(server, tmp_path):
    server.default = Answer(status=302, headers={"Location": PATH})
    assert "infinite loop" in refused(server.url(PATH), tmp_path)


def test_a_redirect_keeps_the_encryption():
    redirects, headers = download_module._Redirects(), Message()
    old = Request("https://example.org/x.pth")
    new = redirects.redirect_request(old, io.BytesIO(), 302, "", headers, "https://b.org/x.pth")
    assert new.full_url == "https://b.org/x.pth"
    with pytest.raises(HTTPError, match=r"redirect to http://b\.org/x\.pth not") as caught:
        redirects.redirect_request(old, io.BytesIO(), 302, "", headers, "http://b.org/x.pth")
    caught.value.close()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/x.pth",
        "data:,x",
        "/models/x.pth",
        "example.org/x.pth",
        "http://",
        "http:///x.pth",
        "http://[::1/x.pth",
        "http://example.org:port/x.pth",
        "http://\ud800/x.pth",
        "\nfile:///etc/passwd",
        "",
    ],
)
def test_only_the_web_is_asked(tmp_path, url):
    message = refused(url, tmp_path)
    assert repr(url) in message
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_compresses_all_the_same(server, tmp_path):
    server.default = Answer(headers={"Content-Encoding": "gzip"})
    assert "the server compresses it" in refused(server.url(PATH), tmp_path)
    assert left(tmp_path) == []


def test_two_threads_make_one_download(server, tmp_path):
    checked = []
    barrier = threading.Barrier(2)

    def call(_):
        barrier.wait()
        return download(server.url(PATH), cache_dir=tmp_path, check=checked.append)

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(call, range(2)))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == OLD
    assert len(server.requests) == len(checked) == 1
    assert left(tmp_path) == ["NAME"]


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "timm_lt").write_text("")
    message = refused(server.url(PATH), tmp_path)
    assert str(tmp_path / "timm_lt") in message
    assert "TORCH_HOME" in message
    assert server.requests == []


@pytest.mark.parametrize("where", ["FileLock.acquire", "write_json", "advance", "Path.replace"])
def test_a_full_disk(server, tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"timm_lt.models.pretrained.{where}", full)
        message = refused(server.url(PATH), tmp_path)
    assert "No space left on device" in message
    assert "NAME" not in left(tmp_path)
    assert download(server.url(PATH), cache_dir=tmp_path).read_bytes() == OLD


def test_bytes_are_on_the_disk_before_the_file_has_its_name(server, tmp_path, monkeypatch):
    steps = []
    fsync, replace = download_module.os.fsync, download_module.Path.replace
    monkeypatch.setattr("os.fsync", lambda file: steps.append("fsync") or fsync(file))

    def rename(path, target):
        steps.append(re.sub(r".*\.pth", "", path.name))
        return replace(path, target)

    monkeypatch.setattr("pathlib.Path.replace", rename)
    download(server.url(PATH), cache_dir=tmp_path, check=lambda _: steps.append("check"))
    assert steps[-3:] == ["fsync", "check", ".incomplete"]


def test_a_terminal_shows_the_bytes(server, tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(download_module, "console", terminal)
    monkeypatch.setattr(download_module.log, "level", logging.INFO)
    download(server.url(PATH), cache_dir=tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "100.0/100.0 kB" in shown


def test_without_a_terminal_nothing_is_shown(server, tmp_path, capsys):
    download(server.url(PATH), cache_dir=tmp_path)
    assert capsys.readouterr() == ("", "")
