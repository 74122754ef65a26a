package istio

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/kubernetes"
	"github.com/meshid/meshid/pkg/server"
)

// maxCSR bounds a request, PEM: twice what RSA 4096 needs.
const maxCSR = 16 << 10

// refusal is why a certificate is not given out.
type refusal struct {
	code codes.Code
	// text is for the caller, detail for the ledger.
	text, detail string
	// record is the reason to record it with; empty if it has been recorded, or is none of
	// the ledger's business.
	record string
	// again: it is that of a moment ago.
	again bool
}

func (r *refusal) Error() string {
	if r.detail != "" && r.detail != r.text {
		return r.text + ": " + r.detail
	}
	return r.text
}

// parseRequest returns the PKCS #10 request in DER. What it asks for is not looked at:
// its signature and its key are checked where the certificate is made. Only a request
// that names another identity than id is refused, since its owner would not accept the
// answer.
func parseRequest(req *istiov1.IstioCertificateRequest, id string) ([]byte, error) {
	bad := func(text string) error {
		return &refusal{code: codes.InvalidArgument, text: text, detail: text, record: server.DirectRequest}
	}
	if req.GetValidityDuration() < 0 {
		return nil, bad("the life that is asked for is negative: write seconds, or 0 for the CA's default")
	}
	if len(req.GetCsr()) > maxCSR {
		return nil, bad("the certificate signing request is larger than 16 KiB")
	}
	block, rest := pem.Decode([]byte(req.GetCsr()))
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" || strings.TrimSpace(string(rest)) != "" {
		return nil, bad("the certificate signing request is not one PEM block of the type CERTIFICATE REQUEST")
	}
	parsed, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, bad("the certificate signing request is malformed")
	}
	for _, uri := range parsed.URIs {
		if uri.String() != id {
			return nil, bad("the certificate signing request names " + quote(uri.String()) + ", and the caller is " + quote(id) +
				": compare the trust domain of the mesh with that of the CA")
		}
	}
	return block.Bytes, nil
}

// quote bounds what is repeated of a request.
func quote(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// lifeOf is the life that is asked for. It is only ever lowered, so that one that is
// more than a duration can hold means the same as the longest.
func lifeOf(req *istiov1.IstioCertificateRequest) time.Duration {
	const longest = 100 * 365 * 24 * 60 * 60
	return time.Duration(min(req.GetValidityDuration(), longest)) * time.Second
}

// encodeChain writes a chain as Istio's clients read it: leaf first, one certificate an
// element, since they drop a second one; the last element has all roots.
func encodeChain(svid *server.DirectSVID, previous []*x509.Certificate) []string {
	chain := make([]string, 0, len(svid.Chain)+1)
	for _, der := range svid.Chain {
		chain = append(chain, encodePEM(der))
	}
	return append(chain, kubernetes.EncodeBundle(append(slices.Clone(svid.Roots), previous...)))
}

func encodePEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// issueRefusal chooses the code for a refusal of the CA. Codes on which Istio's clients
// try again at once are for what may be over by then.
func issueRefusal(err error) *refusal {
	var refused *server.DirectError
	if !errors.As(err, &refused) {
		return &refusal{code: codes.Internal, text: "internal error", detail: err.Error()}
	}
	switch refused.Reason {
	case nodev1.Reason_REASON_CSR:
		return &refusal{code: codes.InvalidArgument, text: refused.Message}
	case nodev1.Reason_REASON_UNAVAILABLE:
		if refused.RetryAfter <= retrySoon {
			return &refusal{code: codes.Unavailable, text: refused.Message}
		}
		return &refusal{code: codes.FailedPrecondition, text: refused.Message}
	default:
		return &refusal{code: codes.PermissionDenied, text: refused.Message}
	}
}
