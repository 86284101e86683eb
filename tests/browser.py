"""A headless Chromium that uses the page as a visitor does; `python tests/browser.py docs/images` takes pictures of it."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# No service of the browser's maker is asked for anything.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"),
    *(
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ),
)
PATIENCE = 120.0  # seconds, on a busy machine


def missing() -> str:
    """What a browser test lacks here, or nothing."""
    lacks = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    lacks += [module for module in ("gradio", "selenium") if find_spec(module) is None]
    return f"no {' and no '.join(lacks)}" if lacks else ""


@contextmanager
def serving(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`nextscale web` in a process of its own: its address, at a free port, and the process."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nextscale", "web", "--port", str(port), *words]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_TEMP_DIR": folder}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                found = re.match(r"(http://\S+) - Ctrl-C ends it", line)
                assert found, line + (process.stdout.read() if process.poll() is not None else "")
                yield found[1], process
                assert process.poll() is None, "the server died"
            finally:
                process.terminate()
                said = process.stdout.read()
        assert "Traceback" not in said, said


@contextmanager
def served(*words: str) -> Iterator[str]:
    """The address alone."""
    with serving(*words) as (address, _):
        yield address


def photo() -> Image.Image:
    """A picture of 1200x800 pixels: a yellow disk with a black rim."""
    image = Image.new("RGB", (1200, 800), "white")
    ImageDraw.Draw(image).ellipse((350, 150, 850, 650), fill="gold", outline="black", width=20)
    return image


class Visitor:
    """A browser at the page, by what stands on its buttons and tabs."""

    def __init__(self, address: str, size: tuple[int, int] = (1200, 1250)) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        self.profile = tempfile.mkdtemp()
        for flag in (*FLAGS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(address)
        self.until(lambda: self.button("Draw") or self.tab_button("Reconstruct"), "the page")

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)

    def until(self, happens: Callable[[], Any], what: str) -> Any:
        """Wait for something, and give it."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(StaleElementReferenceException):  # the page has drawn it anew meanwhile
                if found := happens():
                    return found
            time.sleep(0.02)
        raise AssertionError(f"waited for {what} in vain; the page says: {self.text()[-500:]}")

    def text(self) -> str:
        return self.driver.find_element("tag name", "body").text

    def shown(self, selector: str) -> list[Any]:
        """Elements that can be seen."""
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def button(self, name: str) -> Any:
        buttons = [one for one in self.shown("button") if one.get_attribute("role") != "tab" and one.text == name]
        return buttons[0] if buttons else None

    def tab_button(self, name: str) -> Any:
        return next((one for one in self.shown("button[role=tab]") if one.text == name), None)

    def press(self, name: str) -> None:
        self.until(lambda: _clicked(self.button(name)), f"a button {name}")

    def tab(self, name: str) -> None:
        self.until(lambda: _clicked(self.tab_button(name)), f"a tab {name}")
        self.until(lambda: self.tab_button(name).get_attribute("aria-selected") == "true", f"the tab {name}")

    def status(self) -> str:
        return next((one.text for one in self.shown("p.status") if one.text), "")

    def errors(self) -> str:
        """What the page's messages say."""
        return " ".join(one.text for one in self.shown(".toast-body"))

    def upload(self, path: Path) -> None:
        """Give a file to the tab that is open."""
        panels = [one for one in self.driver.find_elements("css selector", "[role=tabpanel]") if one.is_displayed()]
        panels[0].find_element("css selector", "input[type=file]").send_keys(str(path))

    def stroke(self) -> None:
        """Draw over the middle of the image."""
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.until(lambda: self.shown("canvas"), "the image to draw on")[0]
        moves = ActionChains(self.driver).move_to_element(canvas).click_and_hold()
        for _ in range(3):
            moves = moves.move_by_offset(20, 8).move_by_offset(-30, 10)
        moves.release().perform()

    def pictures(self) -> list[Image.Image]:
        addresses = self.until(lambda: [one.get_attribute("src") for one in self.shown(".pictures img")], "pictures")
        return [Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB") for address in addresses]

    def again(self) -> tuple[str, ...]:
        """The command and the Python that the page shows."""
        return self.until(lambda: tuple(one.text for one in self.shown(".again pre")), "the command")

    def hosts(self) -> set[str]:
        """Where the browser has asked for anything."""
        logged = "".join(entry["message"] for entry in self.driver.get_log("performance"))
        addresses = re.findall(r'"Network.requestWillBeSent".*?"url":"(\w+)://([^/:"]*)', logged)
        return {host for kind, host in addresses if kind in ("http", "https", "ws", "wss")}

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


def _clicked(element: Any) -> bool:
    """Click on it, if there is one."""
    if element is None:
        return False
    element.click()
    return True


def tour(address: str, out: Path) -> dict[str, float]:
    """Generate, edit, reconstruct and vary; pictures of the page go to `out`, and the result says how long things took."""
    took: dict[str, float] = {}
    image = out / "photo.png"
    photo().save(image)
    broken = out / "broken.png"
    broken.write_bytes(image.read_bytes()[:2000])
    with Visitor(address) as visitor:
        visitor.press("Draw")
        began = time.monotonic()
        visitor.until(visitor.status, "the first scale")
        took["first scale"] = time.monotonic() - began
        visitor.until(lambda: visitor.status().startswith("Done"), "eight images")
        took["8 images"] = time.monotonic() - began
        assert len(visitor.pictures()) == 8
        assert visitor.again()[0].startswith("nextscale sample ")
        visitor.screenshot(out / "web-generate.png")

        visitor.tab("Edit")
        visitor.press("Edit")
        visitor.until(lambda: "upload an image first" in visitor.errors(), "a sentence about the missing image")
        visitor.upload(image)
        visitor.until(lambda: visitor.shown("canvas"), "the image")
        time.sleep(2)  # the editor fits the image to the page
        visitor.stroke()
        time.sleep(1)
        visitor.press("Edit")
        visitor.until(lambda: visitor.status().startswith("Done"), "the edited image")
        edited = visitor.pictures()[0]
        assert edited.size == (1200, 800)
        changed = (np.asarray(edited) != np.asarray(photo())).any(axis=-1)
        assert 0.001 < changed.mean() < 0.3, f"{changed.mean():.3f} of the pixels changed"
        assert not changed[:100].any(), "what was not drawn over has changed"
        visitor.screenshot(out / "web-edit.png")

        visitor.tab("Reconstruct")
        visitor.upload(broken)
        visitor.until(
            lambda: visitor.errors() or "cannot be read" in visitor.text(), "a sentence about the broken file"
        )
        visitor.driver.refresh()
        visitor.tab("Reconstruct")
        visitor.upload(image)
        visitor.until(lambda: "scales give" in visitor.status(), "the reconstruction")
        visitor.screenshot(out / "web-reconstruct.png")

        visitor.tab("Variations")
        visitor.upload(image)
        time.sleep(2)
        visitor.press("Vary")
        visitor.until(lambda: visitor.status().startswith("Done"), "variations")
        assert visitor.again()[0].startswith("nextscale vary photo.png ")

        hosts = visitor.hosts()
        assert hosts == {"127.0.0.1"}, f"the page asked {sorted(hosts)}"
    return took


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with served(*sys.argv[2:]) as site, tempfile.TemporaryDirectory() as folder:
        for name, seconds in tour(site, Path(folder)).items():
            print(f"{name}: {seconds:.2f} s")
        for picture in sorted(Path(folder).glob("web-*.png")):
            Image.open(picture).convert("RGB").quantize(64).save(where / picture.name, optimize=True)
            print(where / picture.name)
