"""The demo's second half, in a browser: `make console`, after `make demo`.

Prints a link for each person, serves, and sends the requests of a home, with the right answers as feedback, while a
rollout runs. At a pause the home is quiet: a person decides there. Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import time

from demo import HERE, asked, heading, say, served

PEOPLE = (
    ((), "you, the owner: confirm keys, roll out and back, correct rows, start runs"),
    (("ada", "--as", "ada"), "ada, who approves: open it in another browser, or in a private window"),
)


def main() -> None:
    """Run it."""
    if not (HERE / ".tunesmith").is_dir():
        raise SystemExit("there is no demo yet: run `make demo` first")
    with served(8000) as server, contextlib.suppress(KeyboardInterrupt):
        heading("open these once, within ten minutes; README.md says what to do there")
        for name, does in PEOPLE:
            say(f"  {asked('login-link', *name, '--json')['url']}\n    {does}")
        while True:
            if (rollout := server.newest())["status"] == "running":
                say(f"rollout {rollout['rollout']} runs: the home sends requests")
                server.send_until(lambda entry: entry["status"] != "running")
                say(f"rollout {rollout['rollout']} is {server.newest()['status']}: the home is quiet")
            time.sleep(2)


if __name__ == "__main__":
    main()
