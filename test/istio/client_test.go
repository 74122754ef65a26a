package istio

import (
	"crypto/tls"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshid/meshid/test/local"
)

// clientOf is a client of the mesh, with an identity from the node agent.
func clientOf(t *testing.T, agent *local.Agent) *tls.Config {
	t.Helper()
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(agent.Address())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() })
	return tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString(local.TrustDomain)))
}
