package conformance

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// long returns a SPIFFE ID of n bytes.
func long(n int) string {
	id := "spiffe://" + td
	for len(id) < n {
		id += "/" + strings.Repeat("x", min(200, n-len(id)-1))
		if n-len(id) == 1 { // no room for another segment
			id += "x"
		}
	}
	return id
}

// TestSpec_A03_LongestIDEverywhere: entry, CA, agent, Workload API, go-spiffe and Envoy.
func TestSpec_A03_LongestIDEverywhere(t *testing.T) {
	w := shared(t)
	uid := newUser()
	e := entry("a03", uid)
	e.SpiffeId = long(2048)
	w.apply(t, e)
	svid := w.as(t, uid).context(t).DefaultSVID()
	if got := svid.ID.String(); got != e.GetSpiffeId() || len(got) != 2048 {
		t.Errorf("%d bytes: %s", len(got), got)
	}
	checkLeaf(t, svid.Certificates, e.GetSpiffeId())
	peer, err := envoy(t).ask(t.Context(), svid)
	if err != nil || peer != e.GetSpiffeId() {
		t.Errorf("envoy saw %q: %v", peer, err)
	}
}

// TestSpec_A04_TooLongNowhere: a name of 2,049 bytes comes in by no way.
func TestSpec_A04_TooLongNowhere(t *testing.T) {
	w := shared(t)
	e := entry("a04", newUser())
	e.SpiffeId = long(2049)
	if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "spiffe_id") {
		t.Errorf("entry: %v", err)
	}

	// Through a template, whose value the agent says.
	uid := newUser()
	template := entry("a04-template", uid)
	template.SpiffeId = "spiffe://" + td + `/app/{docker.labels["app"]}`
	template.Workloads = fmt.Sprintf("unix.uid == %d && docker.image == \"x\"", uid)
	w.apply(t, template)
	r := join(t, w.ca, "rogue-a04", nil)
	of := func(n int) *nodev1.IssueItem {
		i := item("a04-template", uid, csrOf(t, newKey(t), nil))
		i.Instance = fmt.Sprint("a04-", n)
		i.Workload.Docker = &attributesv1.Docker{Image: "x", Labels: map[string]string{
			"app": strings.Repeat("x", n-len("spiffe://"+td+"/app/")),
		}}
		return i
	}
	if svid, _ := r.issued(t, of(2048)); len(svid.GetSpiffeId()) != 2048 {
		t.Errorf("%d bytes", len(svid.GetSpiffeId()))
	}
	r.refused(t, of(2049), nodev1.Reason_REASON_TEMPLATE)

	// In a CSR it is not even looked at.
	small := entry("a04-csr", uid)
	w.apply(t, small)
	_, chain := r.issued(t, item("a04-csr", uid, csrOf(t, newKey(t), &x509.CertificateRequest{URIs: uris(t, long(2049))})))
	checkLeaf(t, chain, small.GetSpiffeId())
}

// TestSpec_A05_LongestTrustDomain: of 255 bytes works all the way, of 256 is refused.
func TestSpec_A05_LongestTrustDomain(t *testing.T) {
	require.Root(t)
	domain := strings.Repeat("a.", 127) + "b" // 255
	ca := otherDomain(t, domain)
	if _, err := ca.Admin.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{
		{Name: "x", SpiffeId: "spiffe://" + domain + "/x", Workloads: "unix.uid == 7"},
	}}); err != nil {
		t.Fatal(err)
	}
	bundle := bundleOf(t, ca)
	if root := bundle.X509Authorities()[0]; len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://"+domain {
		t.Errorf("root is for %v", root.URIs)
	}
	svid, chain := join(t, ca, "long", nil).issued(t, item("x", 7, csrOf(t, newKey(t), nil)))
	if svid.GetSpiffeId() != "spiffe://"+domain+"/x" {
		t.Errorf("got %s", svid.GetSpiffeId())
	}
	checkLeaf(t, chain, svid.GetSpiffeId())

	out, err := exec.Command(filepath.Join(local.Binaries(t), "ca"), "check", "--trust-domain", domain+"b").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "trust_domain") || !strings.Contains(string(out), "255") {
		t.Errorf("256 bytes: %v: %s", err, out)
	}
}

// otherDomain starts a CA for another trust domain.
func otherDomain(t *testing.T, domain string) *local.CA {
	t.Helper()
	return local.StartCA(t, local.CAOptions{Wrap: []string{"/bin/sh", "-c", `exec "$@" --trust-domain ` + domain, "sh"}})
}

// TestSpec_A08_PathCaseKept: paths that differ in case are two identities.
func TestSpec_A08_PathCaseKept(t *testing.T) {
	w := shared(t)
	uid := newUser()
	lower, upper := entry("a08-a", uid), entry("a08-b", uid)
	lower.SpiffeId, upper.SpiffeId = "spiffe://"+td+"/a08/web", "spiffe://"+td+"/a08/Web"
	w.apply(t, lower, upper)
	svids := w.as(t, uid).have(t, lower.GetSpiffeId(), upper.GetSpiffeId())
	for i, e := range []*entryv1.Entry{lower, upper} {
		checkLeaf(t, svids[i].Certificates, e.GetSpiffeId())
	}
	// A trust domain has lower case only.
	e := entry("a08-c", uid)
	e.SpiffeId = "spiffe://Example.org/a08/web"
	if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

// TestSpec_A09_ForeignTrustDomain: no entry makes names of another trust domain.
func TestSpec_A09_ForeignTrustDomain(t *testing.T) {
	w := shared(t)
	before, err := w.ca.Admin.ListEntries(t.Context(), &adminv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{
		"spiffe://example.com/x", "spiffe://example.org.evil/x", "spiffe://evil.example.org/x", "spiffe://evilexample.org/x",
		"spiffe://example.org@evil/x", "spiffe://example.org:443/x", `spiffe://{docker.labels["td"]}/x`, `{docker.labels["td"]}/x`,
	} {
		e := entry("a09", newUser())
		e.SpiffeId = id
		e.Workloads += ` && docker.image == "x"`
		if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "spiffe_id") {
			t.Errorf("%s: %v", id, err)
		}
	}
	after, err := w.ca.Admin.ListEntries(t.Context(), &adminv1.ListEntriesRequest{Names: []string{"a09"}})
	if err == nil && len(after.GetEntries()) > 0 {
		t.Errorf("%v is there, at revision %d", after.GetEntries(), before.GetRevision())
	}
}

// TestV_A1_TemplateInjectionByAgent: what an agent says of a workload cannot
// leave the segment of the path that it stands in.
func TestV_A1_TemplateInjectionByAgent(t *testing.T) {
	w := shared(t)
	uid := newUser()
	e := entry("v-a1", uid)
	e.SpiffeId = "spiffe://" + td + `/ns/{docker.labels["ns"]}/app`
	e.Workloads = fmt.Sprintf(`unix.uid == %d && docker.image == "x"`, uid)
	w.apply(t, e)
	r := join(t, w.ca, "rogue-v-a1", nil)
	of := func(label string) *nodev1.IssueItem {
		i := item("v-a1", uid, csrOf(t, newKey(t), nil))
		i.Instance = fmt.Sprintf("v-a1-%x", label)
		i.Workload.Docker = &attributesv1.Docker{Image: "x", Labels: map[string]string{"ns": label}}
		return i
	}
	for _, label := range []string{
		"../../meshid/ca", "../x", "a/../b", "a/b", "..", ".", "", "%2e%2e", "%2e%2e/x", "./", "//", "a//b", "/", "a?x", "a#x",
		"a b", "a\x00b", "a\n", "ä", "a:b", "a@b", "a\\b", "{x}", "…", "а", // the last is cyrillic
	} {
		r.refused(t, of(label), nodev1.Reason_REASON_TEMPLATE)
	}
	if svid, _ := r.issued(t, of("good")); svid.GetSpiffeId() != "spiffe://"+td+"/ns/good/app" {
		t.Errorf("got %s", svid.GetSpiffeId())
	}
}

// TestV_A2_NodeNameIsTheStoredOne: a node is who its token was made for, whatever
// else it says, and no token is made for what is not one segment of a path.
func TestV_A2_NodeNameIsTheStoredOne(t *testing.T) {
	w := shared(t)
	key := newKey(t)
	hostile := csrOf(t, key, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "other"},
		URIs:     uris(t, "spiffe://"+td+"/meshid/node/join_token/other"),
		DNSNames: []string{"other"},
	})
	identity, err := attestNode(t.Context(), dialCA(t, w.ca, nil), newToken(t, w.ca, "v-a2", nil), hostile)
	if err != nil {
		t.Fatal(err)
	}
	checkLeaf(t, parseAll(t, identity.GetChain()), "spiffe://"+td+"/meshid/node/join_token/v-a2")
	for _, name := range []string{"a/b", "../ca", "..", "a\x00b", "\U0001F600", "a b", "a%2fb", strings.Repeat("x", 3000)} {
		if got, err := w.ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: name}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v, %v", name, got.GetNodeId(), err)
		}
	}
	for _, token := range [][]byte{nil, {1}, []byte("\x01a/b"), append([]byte{1}, make([]byte, 32)...), append([]byte{1}, make([]byte, 64<<10)...)} {
		got, err := attestWith(t.Context(), dialCA(t, w.ca, nil), &nodev1.AttestStart{Method: "join_token", Evidence: token, Csr: csrOf(t, newKey(t), nil)})
		if c := status.Code(err); c != codes.PermissionDenied && c != codes.InvalidArgument {
			t.Errorf("evidence of %d bytes: %v, %v", len(token), got, err)
		}
	}
}

// TestV_A9_ReservedNamesByNoWay: neither entries nor templates give the names
// of nodes, of the CA, or of the trust domain itself.
func TestV_A9_ReservedNamesByNoWay(t *testing.T) {
	w := shared(t)
	uid := newUser()
	for _, id := range []string{"", "/", "/meshid", "/meshid/ca", "/meshid/node/join_token/shared", "/meshid/x"} {
		e := entry("v-a9", uid)
		e.SpiffeId = "spiffe://" + td + id
		if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "spiffe_id") {
			t.Errorf("%s: %v", e.GetSpiffeId(), err)
		}
	}
	e := entry("v-a9-template", uid)
	e.SpiffeId = "spiffe://" + td + `/{docker.labels["a"]}/{docker.labels["b"]}`
	e.Workloads = fmt.Sprintf(`unix.uid == %d && docker.image == "x"`, uid)
	if err := w.tryApply(t, e); err != nil {
		if status.Code(err) != codes.InvalidArgument {
			t.Fatal(err)
		}
		return // refused as a whole
	}
	r := join(t, w.ca, "rogue-v-a9", nil)
	i := item("v-a9-template", uid, csrOf(t, newKey(t), nil))
	i.Workload.Docker = &attributesv1.Docker{Image: "x", Labels: map[string]string{"a": "meshid", "b": "ca"}}
	r.refused(t, i, nodev1.Reason_REASON_TEMPLATE)
}
