"""Make an invitation: a one-time token and the fingerprint of the CA, for one site."""

from __future__ import annotations

import re

from medlsdm.errors import UsageError
from medlsdm.federation.identity import SITE_NAME, Invitation, fingerprint
from medlsdm_server.home import ServerHome
from medlsdm_server.registry import Registry


def new_invitation(home: ServerHome, site: str, valid_hours: float, *, again: bool = False) -> Invitation:
    """Draw an invitation and remember the digest of its token; ``again`` for a site that is known.

    Raises:
        UsageError: The name is none of a site, or the site is known (or, with ``again``, is not).
    """
    if not re.fullmatch(SITE_NAME, site):
        raise UsageError("A site's name has 1-32 small letters, digits or dashes.", "For example: --hospital st-anna.")
    invitation = Invitation.new(site, fingerprint(home.ca_cert.read_bytes()), valid_hours)
    Registry(home.registry).invite(invitation, again=again)
    return invitation
