"""The part of the Hugging Face hub that its client needs for a download, served from a dictionary."""

import hashlib
from types import TracebackType

from aiohttp import web

SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves models on the loopback; ``asked`` has the paths of all files that were fetched."""

    def __init__(self, models: dict[str, dict[str, bytes]], revisions: tuple[str, ...] = ("main",)) -> None:
        """``models``: for each model's name, the contents of its files by path."""
        self._models = models
        self._revisions = {*revisions, SHA}
        self.asked: list[str] = []

    async def __aenter__(self) -> "FakeHub":
        app = web.Application()
        model = "{owner}/{name}"
        app.router.add_get(f"/api/models/{model}/revision/{{revision}}", self._info)
        app.router.add_get(f"/api/models/{model}", self._info)
        app.router.add_get(f"/api/models/{model}/tree/{{revision}}", self._tree)
        app.router.add_get(f"/{model}/resolve/{{revision}}/{{path:.+}}", self._file)  # also answers HEAD
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    def _files(self, request: web.Request) -> dict[str, bytes]:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name.startswith("gated/"):
            raise web.HTTPForbidden(headers={"X-Error-Code": "GatedRepo"})
        if name not in self._models:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info.get("revision", "main") not in self._revisions:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return self._models[name]

    async def _info(self, request: web.Request) -> web.Response:
        files = [{"rfilename": path} for path in self._files(request)]
        return web.json_response({"id": "a/b", "sha": SHA, "siblings": files})

    async def _tree(self, request: web.Request) -> web.Response:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self._files(request).items()
        ]
        return web.json_response(entries)

    async def _file(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        content = self._files(request)[path]
        if request.method == "GET":
            self.asked.append(path)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
        return web.Response(body=content, headers=headers)
