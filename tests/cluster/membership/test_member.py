"""Membership keeps one contract over each kind of service."""

from __future__ import annotations

from kit.membership.members_contract import MembershipContract


class TestMembers(MembershipContract):
    pass
