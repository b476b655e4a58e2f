"""/api/evaluations, /api/datasets, /api/review and /api/versions: what was made, and from what.

A dataset version may hold rows of every tenant, so datasets and the review are for users of all tenants and regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Query
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from tunesmith.core.values import View
from tunesmith.server.api.routing import ApiRouter, Digest, Name, Number, Page, Position, Text
from tunesmith.server.serving import Calling
from tunesmith.services import answers, datasets, evaluations, lineage, review
from tunesmith.services import versions as service

if TYPE_CHECKING:
    from tunesmith.data.dataset import DatasetSummary
    from tunesmith.data.governance.difference import Difference
    from tunesmith.evaluation.report.evidence import EvidenceReport

routes = ApiRouter()
Verdict = Annotated[str, Query(pattern="^(sha256:[0-9a-f]{64})?$")]
_EVALUATION, _DATASET, _VERSION = "/evaluations/{digest}", "/datasets/{digest}", "/versions/{name}/{number}"
# The report brings its own style and no script; a browser shows it as a page of nobody.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; sandbox"
# Of documents that are neither a page nor Markdown.
MEDIA = {"bom.json": "application/vnd.cyclonedx+json", "provenance.intoto.jsonl": "application/jsonlines"}


@routes.shows("/evaluations", "read")
def listed_evaluations(call: Calling, page: Page = 1) -> evaluations.EvaluationList:
    """The evaluations that the caller may see, newest first, 25 a page."""
    return evaluations.list_evaluations(call, page)


@routes.shows(_EVALUATION, "read")
def evaluation(call: Calling, digest: Digest, verdict: Verdict = "") -> evaluations.EvaluationPage:
    """One evaluation: its candidates with intervals, and the gates of the leading verdict or of the one named."""
    return evaluations.show_evaluation(call, digest, verdict or None)


@routes.shows(_EVALUATION + "/findings", "read", slow=True, gives=evaluations.show_findings)
def findings(call: Calling, digest: Digest, verdict: Verdict = "") -> EvidenceReport:
    """What takes seconds to compute: advice, differences, approaches, groups, risks, policy and style."""
    return evaluations.show_findings(call, digest, verdict or None)


@routes.shows(_EVALUATION + "/requests", "rows", slow=True)
def requests(
    call: Calling,
    digest: Digest,
    focus: Text = "",
    rival: Text = "",
    metric: Text = "",
    show: Text = "all",
    group: Text = "",
    label: Text = "",
    search: Text = "",
    first: Annotated[int, Query(ge=0, le=10**9)] = 0,
    most: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> answers.RequestMatrix:
    """Held-out requests by candidates: where focus is worse than rival first, then where it is better.

    show: all, flips, wins, losses, invalid or long. group, label, search: only those requests. first: the place to
    begin at; most: how many.
    """
    chosen = {"focus": focus, "rival": rival, "metric": metric, "show": show}
    chosen |= {"group": group, "label": label, "search": search}
    return answers.show_requests(call, digest, chosen, first, most)


@routes.shows(_EVALUATION + "/requests/{row}", "rows", slow=True)
def opened(call: Calling, digest: Digest, row: Name, compared: Text = answers.REFERENCE) -> answers.OpenedRequest:
    """One held-out request: every candidate's answer, how it differs from compared, and what was retrieved."""
    return answers.show_request(call, digest, row, {}, compared)


@routes.shows("/datasets", "read", whole=True)
def listed(call: Calling, page: Page = 1) -> datasets.DatasetPage:
    """Dataset versions, newest first, 25 a page."""
    return datasets.list_datasets(call.store, page)


@routes.shows(_DATASET, "read", whole=True, gives=datasets.summary)
def dataset(call: Calling, digest: Digest) -> DatasetSummary:
    """The account of a dataset version: what happened to every row, splits, leakage, licences and privacy."""
    return datasets.summary(call.store, digest)


@routes.shows(_DATASET + "/difference/{other}", "read", whole=True, gives=datasets.difference)
def difference(call: Calling, digest: Digest, other: Digest) -> Difference:
    """What changed from this dataset version to the other one: ids of rows, splits, licences, settings."""
    before, after = (datasets.find_dataset(call.store, each) for each in (digest, other))
    return datasets.difference(call.store, before, after)


@routes.shows(_DATASET + "/rows", "rows", whole=True, permission="row.read")
def rows(
    call: Calling,
    digest: Digest,
    split: Literal["train", "validation", "test", "removed"] = "train",
    reason: Text = "",
    search: Text = "",
    page: Page = 1,
) -> datasets.RowPage:
    """Rows of a split with their texts, or where rows that were left out came from, 25 a page.

    reason: only rows left out for it. search: only rows with this text.
    """
    dataset = datasets.find_dataset(call.store, digest)
    return datasets.list_rows(call, dataset, split=split, reason=reason, search=search, page=page)


@routes.shows(_DATASET + "/sign-offs", "read", whole=True)
def sign_offs(call: Calling, digest: Digest) -> datasets.SignOffList:
    """The stewards' sign-offs of a dataset version."""
    return datasets.list_sign_offs(call.store, datasets.find_dataset(call.store, digest))


State = Literal["waiting", "open", "conflict", "accept", "edit", "reject", "all"]


class NextItem(View):
    """The next item that waits for the caller; null where there is none."""

    item: int | None


@routes.shows("/review", "rows", whole=True, permission="row.review")
def review_items(call: Calling, state: State = "waiting", page: Page = 1) -> review.ReviewList:
    """Items of the queue without texts, 25 a page, how many are in each state, and how far reviewers agree."""
    return review.list_items(call, state=state, page=page)


@routes.shows("/review/next", "rows", whole=True, permission="row.review")
def following(call: Calling, after: Position = 0) -> NextItem:
    """The number of the next item that waits for the caller. after: the number to begin behind."""
    return NextItem(item=review.next_item(call, after))


@routes.shows("/review/{number}", "rows", whole=True, permission="row.review")
def review_item(call: Calling, number: Number) -> review.ReviewItem:
    """One item with its text and decisions."""
    return review.show(call, number)


@routes.shows("/versions", "read")
def versions(call: Calling, search: Text = "", state: Text = "", page: Page = 1) -> service.VersionPage:
    """The versions that the caller may see, newest first, 50 a page, with their states.

    search: a part of the name, NAME@v3, or the start of a digest. state: only versions in it.
    """
    return service.page_of_versions(call, text=search, state=state, page=page)


@routes.shows(_VERSION, "read")
def version(call: Calling, name: Name, number: Number) -> service.VersionDetails:
    """One version: its gates, who approved or refused it and who is still needed."""
    return service.details(call, service.find_version(call, name, number))


@routes.shows(_VERSION + "/lineage", "read")
def version_lineage(call: Calling, name: Name, number: Number) -> lineage.Lineage:
    """What a version was made from, and what was made from it: records, each with its parents."""
    return lineage.lineage(call.store, service.find_version(call, name, number))


@routes.shows(_VERSION + "/records/{digest}", "read")
def record(call: Calling, name: Name, number: Number, digest: Digest) -> lineage.RecordDetails:
    """One record of a version's lineage."""
    version = service.find_version(call, name, number)
    return lineage.record_details(call, version, digest)


@routes.shows(_VERSION + "/records/{digest}/rows", "read")
def origins(
    call: Calling,
    name: Name,
    number: Number,
    digest: Digest,
    split: Literal["train", "validation", "test"] = "train",
    search: Text = "",
    page: Page = 1,
) -> lineage.OriginPage:
    """Where the rows of a dataset in a version's lineage come from, and under which licence; never their texts."""
    version = service.find_version(call, name, number)
    return lineage.dataset_rows(call, version, digest, split=split, text=search, page=page)


@routes.shows(_VERSION + "/documents/{document}", "read", written=("text/markdown", "text/html", *MEDIA.values()))
def document(call: Calling, name: Name, number: Number, document: service.Document) -> Response:
    """The evaluation report, the datasheet of the rows, the notice of their licences, or a paper."""
    version = service.find_version(call, name, number)
    text = service.document_of(call, version, document)
    if document == "report.html":
        return HTMLResponse(text, headers={"cache-control": "no-store", "content-security-policy": REPORT_POLICY})
    kind = MEDIA.get(document, "text/markdown")
    return PlainTextResponse(text, headers={"cache-control": "no-store"}, media_type=kind)
