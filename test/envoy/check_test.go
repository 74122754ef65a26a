package envoy

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/sds/envoycheck"
	"github.com/meshid/meshid/test/identitytest"
)

// TestV_H1_ConfigDump: what a real Envoy says is in force is understood, with what
// the agent has sent; a careful Envoy and a careless one are told apart.
func TestV_H1_ConfigDump(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	for name, row := range map[string]struct {
		config config
		want   []string
	}{
		"careful": {
			config{Socket: a.socket, Peer: 1, PeerID: "spiffe://a.test/x", Minimum: "TLSv1_3", ConnectionLife: "60s", StreamLife: "60s", PeerConnectionLife: "60s", PeerStreamLife: "60s"},
			[]string{"match_typed_subject_alt_names"}, // this test's Envoys let in whoever has a SPIFFE ID
		},
		"careless": {
			config{Socket: a.socket, Peer: 1, PeerID: "spiffe://a.test/x", Plain: true, Resumption: true, FetchTimeout: "5s", ConnectionLife: "60s"},
			[]string{
				"initial_fetch_timeout", "match_typed_subject_alt_names", "max_connection_duration", "max_stream_duration",
				"session_resumption", "tls_versions",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startEnvoy(t, row.config)
			p.waitLive()
			dump, _ := p.get("/config_dump")
			if !strings.Contains(dump, "SPIFFECertValidatorConfig") {
				t.Error("the secrets that were sent are not in the dump")
			}
			r, err := envoycheck.Check([]byte(dump))
			if err != nil {
				t.Fatal(err)
			}
			var rules []string
			for _, f := range r.Findings {
				rules = append(rules, f.Rule)
			}
			slices.Sort(rules)
			if diff := cmp.Diff(row.want, slices.Compact(rules)); diff != "" || r.Downstreams != 1 || r.Upstreams != 1 {
				found, _ := json.MarshalIndent(r, "", "  ")
				t.Errorf("(-want +got):\n%s%s", diff, found)
			}
		})
	}
}
