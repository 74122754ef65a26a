"""receive.py CERTIFICATE KEY CA SECRET-FILE: an HTTPS server that verifies the
signatures of webhooks with Python's hmac. It answers the first request with 503, the
second with a redirection and the third by hanging up; and prints each that it takes,
one JSON value a line. The first line is its port."""
import base64
import hashlib
import hmac
import http.server
import json
import ssl
import sys
import time

certificate, key, ca, secret_file = sys.argv[1:]
secret = base64.b64decode(open(secret_file).read().strip().removeprefix("whsec_"))
requests = 0


class Receiver(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        global requests
        requests += 1
        body = self.rfile.read(int(self.headers["content-length"]))
        if requests == 1:
            self.send_response(503)
            self.send_header("retry-after", "1")
            self.end_headers()
            return
        if requests == 2:
            self.send_response(307)
            self.send_header("location", "/elsewhere")
            self.end_headers()
            return
        if requests == 3:
            self.connection.close()
            return
        identity, sent = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        signed = b".".join([identity.encode(), sent.encode(), body])
        want = "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
        good = hmac.compare_digest(want, self.headers["webhook-signature"]) and abs(time.time() - int(sent)) < 300
        print(json.dumps({"id": identity, "good": good, "path": self.path, "body": json.loads(body), "requests": requests,
                          "client": self.connection.getpeercert()["subject"][0][0][1]}), flush=True)
        self.send_response(204 if good else 401)
        self.end_headers()


server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
context.load_cert_chain(certificate, key)
context.verify_mode = ssl.CERT_REQUIRED
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
