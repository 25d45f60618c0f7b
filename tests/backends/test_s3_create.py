"""What real servers do with a conditional put, and that stores say the same of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import botocore.exceptions
import pytest
from kit.s3_clients import ONCE, open_with, through
from kit.servers.proxy import FaultProxy
from kit.servers.rules import Answer, ResetAfter, Rule, always, first, let_through, scripted
from kit.servers.s3 import Bucket, S3Server

from ckpt.backends.base import Backend
from ckpt.errors import UsageError
from ckpt.testing.contract import keys

pytestmark = pytest.mark.slow


def honours_conditions(bucket: Bucket) -> bool:
    """Asked with a client that is not ours."""
    client, key = bucket.server.client(), uuid.uuid4().hex
    client.put_object(Bucket=bucket.name, Key=key, Body=b"1", IfNoneMatch="*")
    try:
        client.put_object(Bucket=bucket.name, Key=key, Body=b"2", IfNoneMatch="*")
    except botocore.exceptions.ClientError as error:
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 412
        return True
    finally:
        client.delete_object(Bucket=bucket.name, Key=key)
    return False


@pytest.mark.parametrize("kind", ["s3_server", "moto_server"])
def test_store_says_of_its_server_what_the_server_does(
    kind: str, client: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    bucket = server.bucket()
    store = open_with(client, monkeypatch, bucket.url, bucket.options)
    assert store.capabilities().create_only is honours_conditions(bucket)
    assert honours_conditions(bucket) or server.kind != "moto"
    assert bucket.server.client().list_objects_v2(Bucket=bucket.name)["KeyCount"] == 0


class TestProbe:
    """On a server that honours conditions, with something in between."""

    @pytest.fixture(autouse=True)
    def world(
        self,
        client: str,
        moto_server: S3Server,
        fault_proxy: Callable[..., FaultProxy],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.bucket = moto_server.bucket()
        self.proxy = fault_proxy(moto_server.endpoint)
        options = through(self.bucket, self.proxy.endpoint, config_kwargs=ONCE)
        self.store: Backend = open_with(client, monkeypatch, self.bucket.url, options)

    def test_asks_once_with_three_requests_below_a_name_of_its_own(self) -> None:
        for _ in range(3):
            assert self.store.capabilities().create_only
        seen = [seen.request for seen in self.proxy.seen]
        assert [request.method for request in seen] == ["PUT", "PUT", "DELETE"]
        assert len({request.path for request in seen}) == 1
        assert "/some/run/.probe/" in seen[0].path
        assert keys(self.store) == []

    @pytest.mark.parametrize("status", [401, 403, 404, 409, 500, 503])
    def test_refusal_for_another_reason_is_no_yes_and_is_asked_again(self, status: int) -> None:
        self.proxy.rule = scripted(
            [None] + [Answer(status, "Whatever")] * 9, when=lambda seen: seen.method == "PUT"
        )
        assert not self.store.capabilities().create_only
        with pytest.raises(UsageError, match="only once"):
            self.store.put("log/1", [b"x"], create_only=True)
        self.proxy.rule = let_through
        assert self.store.capabilities().create_only

    def test_lost_reply_is_no_answer(self) -> None:
        self.proxy.rule = first(1, ResetAfter())
        self.store.capabilities()
        self.proxy.rule = let_through
        assert self.store.capabilities().create_only
        assert self.bucket.server.client().list_objects_v2(Bucket=self.bucket.name)["KeyCount"] == 0

    def test_store_that_refuses_to_delete_still_tells(self) -> None:
        self.proxy.rule = always(
            Answer(403, "AccessDenied"), when=lambda seen: seen.method == "DELETE"
        )
        assert self.store.capabilities().create_only
        assert keys(self.store) == []

    @pytest.mark.parametrize("rule", [always(Answer(501, "NotImplemented"))])
    def test_server_without_conditions_is_not_asked_again(self, rule: Rule) -> None:
        self.proxy.rule = rule
        assert not self.store.capabilities().create_only
        asked = len(self.proxy.seen)
        assert not self.store.capabilities().create_only
        assert len(self.proxy.seen) == asked
