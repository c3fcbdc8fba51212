#!/usr/bin/env python3
"""An SMTP receiver for tests: smtp_catcher.py PORT OUT.jsonl [--auth USER:PASSWORD] [--tls CERT KEY]
[--require-tls] [--fail-first N] [--reject WORD].

Writes one JSON line a mail. --fail-first answers N mails with 451 (try again), --reject answers 550 to
recipients that contain WORD."""
import argparse
import asyncio
import email
import email.policy
import json
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("out")
parser.add_argument("--auth")
parser.add_argument("--tls", nargs=2)
parser.add_argument("--require-tls", action="store_true")
parser.add_argument("--fail-first", type=int, default=0)
parser.add_argument("--reject")
options = parser.parse_args()


class Catcher:
    failures_left = options.fail_first

    async def handle_RCPT(self, server, session, envelope, address, rcpt_options):
        if options.reject and options.reject in address:
            return "550 5.1.1 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        if self.failures_left > 0:
            self.failures_left -= 1
            return "451 4.3.0 try again later"
        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        parts = {p.get_content_type(): p.get_content() for p in mail.walk() if not p.is_multipart()}
        line = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "subject": str(mail["Subject"] or ""),
            "message_id": str(mail["Message-ID"] or ""),
            "headers": {k.lower(): str(v) for k, v in mail.items()},
            "text": parts.get("text/plain", ""),
            "html": parts.get("text/html", ""),
            "tls": session.ssl is not None,
            "authenticated": bool(session.authenticated),
        }
        with open(options.out, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        return "250 OK"


def authenticate(server, session, envelope, mechanism, data):
    user, password = options.auth.split(":", 1)
    good = (data.login, data.password) == (user.encode(), password.encode())
    return AuthResult(success=good, handled=good)


def make():
    context = None
    if options.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*options.tls)
    return SMTP(
        Catcher.one,
        hostname="localhost",
        tls_context=context,
        require_starttls=options.require_tls,
        auth_required=bool(options.auth),
        auth_require_tls=bool(options.auth and options.tls),
        authenticator=authenticate if options.auth else None,
        enable_SMTPUTF8=True,
    )


async def main():
    Catcher.one = Catcher()
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", options.port)
    async with server:
        await server.serve_forever()


try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(0)
