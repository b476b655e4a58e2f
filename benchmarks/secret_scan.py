"""Secrets in sentences and commands: how many planted tokens are found, and how many clean rows are called a secret.

    python benchmarks/secret_scan.py [DATA]

Tokens of thirteen kinds are planted into sentences and shell commands, and keys without a form of their own as people
paste them. The clean rows are requests (snips, clinc150 and
banking77 where DATA, a folder with theirs, is given), the demo's commands for a smart home, and shell commands full of
what looks like a token and is none: digests, commits, identifiers, variables, paths. Beside it: detect-secrets with all
its plugins as it comes, and credsweeper where it is installed (group `bench`).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tunesmith.data.privacy.credentials import find_secrets
from tunesmith.data.privacy.synthetic_pii import KEY_FORMS, SECRETS, key_of_no_form

PLANTED_EACH, CLEAN = 60, 6000
FRAMES = (
    "hi, my key is {} but the upload still fails",
    "please use {} when you call the service",
    "export SERVICE_KEY={} && ./deploy.sh",
    'curl -H "Authorization: Bearer {}" https://api.example.com/v1/items',
    "i pasted {} into the chat by mistake",
    "{} is what the dashboard shows me",
    "Set the token to {}.",
    "why does ({}) not work?",
)
# A password is a secret by the words before it alone.
NAMED_FRAMES = (
    "my password is {}", "the password for anna is {}", "password: {}", "log in with password {} please",
    "export DB_PASSWORD={}", "passwd={}", "The wifi password is {}, thanks", 'set secret = "{}"',
)  # fmt: skip
COMMANDS = (
    "git checkout {hex40}", "git show {hex7}:src/main.py", "docker pull alpine@sha256:{hex64}",
    "kubectl get pod web-{hex10}-x2x4z -n prod -o yaml", "kubectl create secret generic db --from-literal=key=$KEY",
    'curl -H "Authorization: Bearer $TOKEN" https://api.example.com/users/{number}', "echo $API_KEY | wc -c",
    "aws s3 cp s3://logs-{number}/2024-01-31/part-0001.gz .", "ssh -i ~/.ssh/id_ed25519 app@10.0.0.{byte}",
    "openssl rand -base64 32 > secret.key", "pip install torch==2.{byte}.0", "sha256sum -c build-{hex10}.tar.gz",
    "psql postgresql://localhost:5432/app -c 'select 1'", "tar -xzf release-v1.{byte}.3-linux-x86_64.tar.gz",
    "export TOKEN=your-token-here", "cat /run/secrets/db_password", "grep -rn password src/ | head -{byte}",
    "mysql -u root -p < backup-{number}.sql", "npm install left-pad@1.{byte}.0", "uuid {uuid} was not found",
    "tail -n {byte} /var/log/nginx/access.log", "find . -name '*.pem' -mtime +{byte}", "chmod 600 ~/.aws/credentials",
    "gh secret set DEPLOY_KEY < key.pem", "ls -la token_{byte}.txt", "passwd --expire user{byte}",
    "vault kv get -field=password secret/app", "terraform import aws_instance.web i-0{hex16}",
    "ffmpeg -i in.mp4 -vf scale=1280:-1 out_{number}.mp4", "python train.py --seed {number} --max-tokens 512",
)  # fmt: skip


def planted() -> list[tuple[str, str, str]]:
    """(kind, secret, text)."""
    rows = []
    for kind, make in sorted(SECRETS.items()):
        frames = NAMED_FRAMES if kind == "password" else FRAMES
        for number in range(PLANTED_EACH):
            value = make(random.Random(f"{kind} {number}"))
            secret = value.split(":")[2].split("@")[0] if kind == "url with password" else value
            rows.append((kind, secret, frames[number % len(frames)].format(value)))
    for form in KEY_FORMS:
        for number in range(PLANTED_EACH):
            key = key_of_no_form(random.Random(f"{form} {number}")).rstrip("=")
            rows.append(("key of no form", key, form.replace("{}", key, 1)))
    return rows


def commands(count: int) -> list[str]:
    """Shell commands without a secret."""
    chance = random.Random(7)

    def hexes(n: int) -> str:
        return "".join(chance.choice("0123456789abcdef") for _ in range(n))

    made = []
    for number in range(count):
        fill = {f"hex{n}": hexes(n) for n in (7, 10, 16, 40, 64)}
        uuid = "-".join(hexes(n) for n in (8, 4, 4, 4, 12))
        frame = COMMANDS[number % len(COMMANDS)]
        made.append(frame.format(**fill, uuid=uuid, number=chance.randint(1000, 99999), byte=chance.randint(1, 99)))
    return made


def clean(data: Path | None) -> dict[str, list[str]]:
    """Rows without a secret, by where they come from; 6,000 together."""
    sources = {"shell commands": commands(1200), "home commands": home_commands()}
    if data is not None:
        snips = [path for path in sorted((data / "snips").glob("*.json")) if "full" in path.name]
        texts = []
        for path in snips:
            for rows in json.loads(path.read_bytes().decode("utf-8", "replace")).values():
                texts.extend("".join(part["text"] for part in row["data"]).strip() for row in rows)
        sources["snips"] = texts
        clinc = json.loads((data / "clinc150" / "data_data_full.json").read_text())
        sources["clinc150"] = [row[0] for split in sorted(clinc) for row in clinc[split]]
        with (data / "banking77" / "banking_data_train.csv").open() as stream:
            sources["banking77"] = [row[0] for row in csv.reader(stream)]
    share = (CLEAN - 1200) // max(1, len(sources) - 1)
    chance = random.Random(11)
    return {
        name: texts if name == "shell commands" else chance.sample(sorted(set(texts)), min(share, len(set(texts))))
        for name, texts in sources.items()
    }


def home_commands() -> list[str]:
    """The demo's requests, expanded from the sentence templates that it reads."""
    script = Path(__file__).parents[1] / "examples/home_intents/make_rows.py"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "home_intents.jsonl"
        done = subprocess.run([sys.executable, str(script), "--into", folder], capture_output=True, check=False)
        if done.returncode or not target.is_file():
            return []
        return [json.loads(line)["messages"][-2]["content"] for line in target.read_text().splitlines()]


def detect_secrets(texts: list[str]) -> list[list[str]]:
    """All plugins and filters as they come; a file a text, since it reports equal findings of a file once."""
    from detect_secrets import SecretsCollection
    from detect_secrets.settings import default_settings

    found = []
    with tempfile.TemporaryDirectory() as folder, default_settings():
        path = Path(folder) / "text.txt"
        for text in texts:
            path.write_text(text + "\n")
            secrets = SecretsCollection(root=folder)
            secrets.scan_file(path.name)
            found.append([str(one.secret_value) for _, one in secrets])
    return found


def credsweeper() -> Callable[[list[str]], list[list[str]]] | None:
    """Its patterns and its model of what a secret is, on one text as a file's content."""
    try:
        from credsweeper.app import CredSweeper
        from credsweeper.file_handler.string_content_provider import StringContentProvider
    except ImportError:
        return None
    sweeper = CredSweeper()

    def find(texts: list[str]) -> list[list[str]]:
        scans = (sweeper.file_scan(StringContentProvider(text.splitlines())) for text in texts)
        return [[line.value for one in found for line in one.line_data_list if line.value] for found in scans]

    return find


def ours(texts: list[str]) -> list[list[str]]:
    """What the package finds."""
    return [[text[start:end] for start, end in find_secrets(text)] for text in texts]


def main() -> None:
    """Print recall by kind and false rows by source, for each tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the published data sets")
    texts = clean(parser.parse_args().folder)
    rows = planted()
    tools = {"ours": ours, "detect-secrets": detect_secrets, "credsweeper": credsweeper()}
    print(f"{len(rows)} planted tokens of {len(SECRETS) + 1} kinds", end="; ")
    print(f"{sum(map(len, texts.values()))} clean rows: ", end="")
    print(", ".join(f"{name} {len(some)}" for name, some in texts.items()))
    for name, find in tools.items():
        if find is None:
            print(f"{name}: not installed")
            continue
        find(["to load what is loaded once"])
        began = time.process_time()
        hits = zip(rows, find([text for _, _, text in rows]), strict=True)
        missed = Counter(
            kind for (kind, secret, _), found in hits if not (covers(secret, found) if name == "ours" else found)
        )
        false = Counter({source: sum(map(bool, find(some))) for source, some in texts.items()})
        seconds = time.process_time() - began
        total, count = sum(map(len, texts.values())), len(rows)
        print(
            f"{name:15} finds {1 - missed.total() / count:.1%}, false rows {false.total() / total:.2%}, "
            f"{seconds / (total + count) * 1e3:.3f} ms a row"
        )
        print(f"  missed: {dict(missed) or 'none'}; false: {dict(+false) or 'none'}")


def covers(secret: str, found: list[str]) -> bool:
    """Whether a finding holds the whole secret. Of the others any finding in the row is taken for it."""
    return any(secret in one for one in found)


if __name__ == "__main__":
    main()
