package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger/tree"
)

const (
	defaultConfigPath  = "/etc/meshid/ca.yaml"
	defaultDataDir     = "/var/lib/meshid/ca"
	defaultAdminSocket = "/run/meshid-ca/admin.sock"
	defaultListen      = ":8443"
	defaultMetrics     = "127.0.0.1:9640"

	revocationOff   = "off"
	revocationLists = "crl"
)

// settings is ca.yaml. docs/configuration.md is generated from the comments
// here; every field but trust_domain has a good zero value.
type settings struct {
	// The name under which all identities are issued, such as "example.org".
	// It cannot be changed later.
	TrustDomain string `yaml:"trust_domain"`
	// Folder of the database, the root's key, and the ledger's journal and tree;
	// created with mode 0700.
	DataDir string `yaml:"data_dir" default:"/var/lib/meshid/ca"`
	// Name of this CA process in records; the host's name by default.
	Instance string `yaml:"instance" default:"the host name"`
	// Address for node agents and for admins over mTLS.
	Listen string `yaml:"listen" default:":8443"`
	// Unix socket of the admin API, for root and for the user that ca runs as.
	AdminSocket string `yaml:"admin_socket" default:"/run/meshid-ca/admin.sock"`
	// Address of /metrics, /livez and /readyz; "off" for none.
	MetricsListen string `yaml:"metrics_listen" default:"127.0.0.1:9640"`
	// X.509-SVIDs.
	SVID struct {
		// Life of an X.509-SVID whose entry does not say.
		DefaultTTL config.Duration `yaml:"default_ttl" default:"1h"`
		// Longest life that an entry may ask for.
		MaxTTL config.Duration `yaml:"max_ttl" default:"24h"`
		// Life of a node agent's own X.509-SVID.
		NodeTTL config.Duration `yaml:"node_ttl" default:"4h"`
		// How far not_before lies in the past, for clocks that are behind; at
		// most a quarter of the life.
		Backdate config.Duration `yaml:"backdate" default:"5m"`
	} `yaml:"svid"`
	// Signing certificates.
	Authority struct {
		// Where the root's key lives: file: for a file below data_dir, or the URI of a
		// device or service, such as pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=ca.
		// See docs/keys.md.
		Key string `yaml:"key" default:"file:"`
		// File of the passphrase that encrypts the key's file, or of the device's PIN;
		// mode 0600. By default systemd's credential root_key_secret, if there is one. Without
		// any, a key's file is not encrypted.
		KeySecretFile string `yaml:"key_secret_file"`
		// Kind of a new root's key: ec-p256, ec-p384, rsa-3072, rsa-4096 or ed25519.
		RootKeyType string `yaml:"root_key_type" default:"ec-p256"`
		// Life of the self-signed root.
		RootLife config.Duration `yaml:"root_life" default:"87600h"`
		// Life of this process's intermediate; it is renewed at half of it.
		IntermediateLife config.Duration `yaml:"intermediate_life" default:"168h"`
		// Kind of the intermediates' keys, which are in memory and sign the X.509-SVIDs: one of
		// those of root_key_type. See docs/keys.md for what each costs.
		IntermediateKeyType string `yaml:"intermediate_key_type" default:"ec-p256"`
		// Have intermediates below this CA's own root permit URIs of the trust domain only.
		// Verifiers that do not know such constraints, rustls among them, refuse them.
		NameConstraints bool `yaml:"name_constraints" default:"false"`
		// Have commands that change roots, such as ca authority rotate root, wait until
		// somebody else has approved them. What the CA does by itself needs nobody. See
		// docs/rotation.md.
		TwoPersons bool `yaml:"two_persons" default:"false"`
		// What is in the names of new roots and intermediates.
		Subject subjectSettings `yaml:"subject"`
	} `yaml:"authority"`
	// Registration entries.
	Entries struct {
		// Have entries that give power, those marked admin or downstream, wait until
		// somebody else has approved them, when they are new or changed. See
		// docs/rotation.md.
		TwoPersons bool `yaml:"two_persons" default:"false"`
	} `yaml:"entries"`
	// How certificates are revoked before they expire: off, or crl, by revocation lists
	// that proxies go by. It takes a root of this CA's own and no CAs below. See
	// docs/withdrawal.md.
	Revocation string `yaml:"revocation" default:"off"`
	// The CA of somebody else, as the root above this one's intermediates. Without
	// this section, a root of its own.
	Upstream upstreamSettings `yaml:"upstream"`
	// The record of every decision.
	Ledger struct {
		// Who cosigns the signed checkpoints (C2SP tlog-witness), so that whoever
		// has this machine cannot take records back unseen.
		Witnesses []witnessSettings `yaml:"witnesses"`
		// How many of the witnesses must have cosigned a checkpoint before it is
		// published. With 0 it is published at once, and again with what came.
		// Issuing never waits for witnesses.
		WitnessQuorum int `yaml:"witness_quorum" default:"0"`
	} `yaml:"ledger"`
	// How machines may prove who they are. Without this section, join tokens.
	NodeAttestation nodeAttestation `yaml:"node_attestation"`
	// Where the ledger's records are sent besides: a list. See docs/audit.md.
	Exports []exportSettings `yaml:"exports"`
	// The read-only web console. See docs/console.md.
	Console consoleSettings `yaml:"console"`
	// The clusters whose pods are given identities. See docs/kubernetes.md.
	Kubernetes kubernetesSettings `yaml:"kubernetes"`
	// The CA for the sidecars, gateways and ztunnels of an unmodified Istio. See docs/istio.md.
	Istio istioSettings `yaml:"istio"`
}

// subjectSettings is the subject of certificates that sign.
type subjectSettings struct {
	// What stands before "root" and "intermediate"; 51 characters at most.
	CommonName string `yaml:"common_name" default:"meshid"`
	// O, as RFC 4514 writes it; 64 characters at most.
	Organization string `yaml:"organization" default:"the trust domain"`
	// OU; 64 characters at most.
	OrganizationalUnit string `yaml:"organizational_unit" default:"none"`
	// C, the code of two letters (ISO 3166).
	Country string `yaml:"country" default:"none"`
	// ST; 128 characters at most.
	Province string `yaml:"province" default:"none"`
	// L; 128 characters at most.
	Locality string `yaml:"locality" default:"none"`
}

// exportSettings is one export, with one section for each kind of target in
// plugins.go.
type exportSettings struct {
	// Name of the export in metrics and conditions, and of its cursor: which records
	// were delivered belongs to the name.
	Name string `yaml:"name"`
	// Where an export begins that has no cursor yet: now, or beginning.
	From string `yaml:"from" default:"now"`
	// The events that are sent, such as issue, attest or entry_applied.
	Events []string `yaml:"events" default:"all"`
	// The outcomes that are sent: success, refused, error.
	Outcomes []string `yaml:"outcomes" default:"all"`
	// To a file, one record a line.
	File config.Section `yaml:"file" settings:"pkg/ledger/export/file"`
	// To a syslog receiver (RFC 5424).
	Syslog config.Section `yaml:"syslog" settings:"pkg/ledger/export/syslog"`
	// To an OpenTelemetry collector, as logs.
	OTLP config.Section `yaml:"otlp" settings:"pkg/ledger/export/otlp"`
	// To a URL, as signed requests.
	Webhook config.Section `yaml:"webhook" settings:"pkg/ledger/export/webhook"`
}

// upstreamSettings has one section for each kind in plugins.go, of which one is used.
type upstreamSettings struct {
	// SHA-256 of the upstream CA's roots that may be trusted, in hexadecimal as
	// `openssl x509 -fingerprint -sha256` prints it. Without any, those that its
	// first answer names are, and the log says which.
	RootsSHA256 []string `yaml:"roots_sha256"`
	// Whether the upstream CA signs each X.509-SVID itself, for those who may not have
	// the key of a CA here: it has to be there whenever one is needed. See
	// docs/upstream/leaves.md.
	Leaves bool `yaml:"leaves" default:"false"`
	// An AWS Private CA; see docs/upstream/awspca.md.
	AWSPCA config.Section `yaml:"awspca" settings:"pkg/ca/upstream/awspca"`
	// An issuer of cert-manager; see docs/upstream/certmanager.md.
	CertManager config.Section `yaml:"certmanager" settings:"pkg/ca/upstream/certmanager"`
	// A CA whose certificate and key are files; see docs/upstream/disk.md. Settings: certificate, the PEM file
	// of the CA's certificate and of those between it and the root; key, the PEM
	// file of its private key, mode 0600; roots, the PEM file of the roots above it.
	Disk config.Section `yaml:"disk"`
	// A CA in EJBCA; see docs/upstream/ejbca.md.
	EJBCA config.Section `yaml:"ejbca" settings:"pkg/ca/upstream/ejbca"`
	// A process of your own that stands for a CA; see docs/upstream/external.md.
	External config.Section `yaml:"external" settings:"pkg/ca/upstream/external"`
	// A CA pool of Google Cloud; see docs/upstream/gcpcas.md.
	GCPCAS config.Section `yaml:"gcpcas" settings:"pkg/ca/upstream/gcpcas"`
	// A signer of Kubernetes' API for certificates; see docs/upstream/k8scsr.md.
	K8sCSR config.Section `yaml:"k8scsr" settings:"pkg/ca/upstream/k8scsr"`
	// Another meshid, of the same trust domain; see docs/upstream/meshid.md.
	Meshid config.Section `yaml:"meshid" settings:"pkg/ca/upstream/meshid"`
	// A SPIRE deployment of the same trust domain; see docs/upstream/spire.md.
	SPIRE config.Section `yaml:"spire" settings:"pkg/ca/upstream/spire"`
	// A step-ca; see docs/upstream/stepca.md.
	StepCA config.Section `yaml:"stepca" settings:"pkg/ca/upstream/stepca"`
	// A PKI mount of HashiCorp Vault or OpenBao; see docs/upstream/vault.md.
	Vault config.Section `yaml:"vault" settings:"pkg/ca/upstream/vault"`
}

// witnessSettings is one witness.
type witnessSettings struct {
	// Where it listens, such as "https://witness.example.org/": add-checkpoint
	// is below it.
	URL string `yaml:"url"`
	// Its public key as it prints it: <name>+<hash>+<base64>.
	Key string `yaml:"key"`
}

// consoleSettings are those of the web console.
type consoleSettings struct {
	// Address of the console, such as 127.0.0.1:8444; without it, there is none.
	Listen string `yaml:"listen" default:"off"`
	// Address by which browsers reach it, such as "https://console.example.org";
	// by default that of listen.
	URL string `yaml:"url"`
	// Further names by which browsers may reach it, without port. Requests for names
	// that are not here are refused.
	Names []string `yaml:"names"`
	// PEM file of a certificate that browsers accept, with those between it and its
	// root. It is read again when it changes. Without it, the console shows the CA's
	// own X.509-SVID, of which browsers warn.
	Certificate string `yaml:"certificate"`
	// PEM file of the certificate's private key, mode 0600.
	Key string `yaml:"key"`
	// How long a login lasts.
	SessionLife config.Duration `yaml:"session_life" default:"8h"`
	// Let people sign in with single-use links, which `ca console link` makes; one
	// is printed at the start.
	OneTimeLink bool `yaml:"one_time_link" default:"false"`
	// Let people sign in with certificates.
	MTLS struct {
		// X.509-SVIDs whose SPIFFE ID is that of an entry marked admin.
		Admins bool `yaml:"admins" default:"false"`
		// PEM file of CAs whose client certificates are looked at.
		ClientCA string `yaml:"client_ca"`
		// Their certificates that may look: by subject as RFC 4514 writes it, by DNS name,
		// or by e-mail address.
		Subjects []string `yaml:"subjects"`
	} `yaml:"mtls"`
	// Let people sign in with an OpenID Connect provider. It has to send browsers back
	// to the console's address with /console/login/callback.
	OIDC struct {
		// Address of the provider, as in its tokens.
		Issuer string `yaml:"issuer"`
		// Name of the console at the provider.
		ClientID string `yaml:"client_id"`
		// File with the secret of the console at the provider, mode 0600; none for a
		// public client.
		ClientSecretFile string `yaml:"client_secret_file"`
		// What to ask for beside openid.
		Scopes []string `yaml:"scopes"`
		// The claim with a person's groups.
		GroupsClaim string `yaml:"groups_claim" default:"groups"`
		// Subjects (the claim sub) that may look.
		Subjects []string `yaml:"subjects"`
		// Groups whose members may look.
		Groups []string `yaml:"groups"`
		// PEM file of the CAs that issue the provider's certificate; by default, those
		// of the system.
		CA string `yaml:"ca"`
	} `yaml:"oidc"`
}

// kubernetesSettings are those of Kubernetes.
type kubernetesSettings struct {
	// The clusters whose API servers the CA asks: a list.
	Clusters []clusterSettings `yaml:"clusters"`
	// What becomes of Kubernetes workloads on nodes that are of none of these clusters, as
	// far as the CA knows: refuse, or believe their agents.
	OtherNodes string `yaml:"other_nodes" default:"refuse"`
}

// clusterSettings is one cluster.
type clusterSettings struct {
	// Name of the cluster: in rules node.k8s.cluster, and in metrics and conditions.
	Name string `yaml:"name"`
	// The kubeconfig file by which its API server is reached, and the one of the file's
	// contexts. Files that it names are read again when they change.
	Kubeconfig string `yaml:"kubeconfig" default:"the service account of the pod that the CA runs in"`
	// The context of the kubeconfig file.
	Context string `yaml:"context" default:"its current one"`
	// Whose word it is that a pod runs on the node that asks for it. seen: the API server's,
	// and while that cannot be heard, the agent's about pods that were seen on its node
	// before. strict: the API server's, and while that cannot be heard, nothing is issued for
	// pods. off: the agent's.
	Placement string `yaml:"placement" default:"seen"`
	// A label (ca token create --label) of nodes that attest by another method than
	// k8s_psat: a node that has it is one of this cluster, by the name that is its value.
	NodeLabel string `yaml:"node_label" default:"none"`
	// Namespaces of whose static pods nodes are believed, such as kube-system: a list. What
	// the cluster says of such a pod, its node has written, with the labels that it likes.
	StaticPods []string `yaml:"static_pods" default:"none"`
	// Put the cluster's RegistrationEntry objects into force, for its own nodes.
	Entries bool `yaml:"entries" default:"false"`
	// Publish the trust bundle where the cluster's TrustBundle objects say.
	TrustBundles bool `yaml:"trust_bundles" default:"false"`
	// Publish the trust bundle without such an object.
	Bundle struct {
		// Name of a ConfigMap in each namespace that is chosen.
		ConfigMap string `yaml:"config_map" default:"none"`
		// The key in it that has the bundle, PEM.
		Key string `yaml:"key" default:"bundle.pem"`
		// Selector of the namespaces by label, as kubectl writes it.
		Namespaces string `yaml:"namespaces" default:"all"`
		// Name of a ClusterTrustBundle, such as meshid.io:svid:bundle.
		ClusterTrustBundle string `yaml:"cluster_trust_bundle" default:"none"`
	} `yaml:"bundle"`
	// Certificates as files, which the kubelet writes into podCertificate volumes.
	PodCertificates struct {
		// The name by which these volumes ask for this CA, such as meshid.io/svid: the CA
		// then answers the cluster's PodCertificateRequest objects for it.
		Signer string `yaml:"signer" default:"none"`
	} `yaml:"pod_certificates"`
}

// istioSettings are those of the CA for an unmodified Istio.
type istioSettings struct {
	// Address for Istio's clients, such as ":15012"; without it, there is none.
	Listen string `yaml:"listen" default:"off"`
	// Names by which the clients reach it: the host in Istio's caAddress, such as
	// ca.mesh-ca.svc. They are in the CA's own X.509-SVID.
	DNSNames []string `yaml:"dns_names"`
	// The clusters whose sidecars, gateways and ztunnels are served: a list. Without it, all of
	// kubernetes.clusters.
	Clusters []istioCluster `yaml:"clusters"`
	// Audiences of which a token must have one.
	Audiences []string `yaml:"audiences" default:"istio-ca"`
	// Service accounts, as namespace/name, that may ask on behalf of the pods on their
	// node: istio-system/ztunnel, in ambient mode.
	NodeProxies []string `yaml:"node_proxies" default:"none"`
	// OpenID Connect providers whose subjects are service accounts, for machines outside
	// of the clusters: a list.
	Issuers []istioIssuer `yaml:"issuers"`
	// Accept an unexpired X.509-SVID in place of a token, for the same identity: for
	// machines outside of the clusters.
	RenewWithCertificate bool `yaml:"renew_with_certificate" default:"false"`
	// PEM file of the roots of the CA that this one replaces. They are given out with our
	// own until the setting is removed; whoever has their keys can name anybody in the mesh.
	PreviousRoots string `yaml:"previous_roots"`
	// Connections at the same time; a quarter of them from one address.
	Connections int `yaml:"connections" default:"16384"`
}

// istioCluster is one cluster.
type istioCluster struct {
	// Name of the cluster in kubernetes.clusters; with jwks, it need not be there. Its tokens
	// are then believed until they expire, also after their pods have gone, and nobody may
	// ask on behalf of others.
	Name string `yaml:"name"`
	// Verify tokens by the cluster's keys, in place of asking it about each (TokenReview).
	JWKS *istioKeys `yaml:"jwks"`
	// Further names by which clients call it: Istio's clusterName (ISTIO_META_CLUSTER_ID).
	Aliases []string `yaml:"aliases" default:"Kubernetes, if there is one cluster"`
	// Whether clients that name no cluster are of this one.
	Default bool `yaml:"default" default:"if there is one cluster"`
	// Keep the ConfigMap with the roots in its namespaces, which istiod does not do if its
	// CA is off.
	Roots struct {
		Keep bool `yaml:"keep" default:"false"`
		// Name of the ConfigMaps.
		Name string `yaml:"name" default:"istio-ca-root-cert"`
		// Selector of the namespaces by label, as kubectl writes it.
		Namespaces string `yaml:"namespaces" default:"all"`
	} `yaml:"roots"`
	// Keep the Secret with the certificate of Istio's control plane.
	Istiod struct {
		Keep bool `yaml:"keep" default:"false"`
		// Where the control plane runs.
		Namespace string `yaml:"namespace" default:"istio-system"`
		// Name of the Secret.
		Secret string `yaml:"secret" default:"istiod-tls"`
		// Service account of the control plane.
		ServiceAccount string `yaml:"service_account" default:"istiod-service-account"`
	} `yaml:"istiod"`
}

// istioKeys are where a cluster's keys are.
type istioKeys struct {
	// Issuer of the cluster's tokens, from `kubectl get --raw
	// /.well-known/openid-configuration`.
	Issuer string `yaml:"issuer"`
	// Path of the key set, from `kubectl get --raw /openid/v1/jwks`. It is read again
	// when it changes.
	File string `yaml:"file"`
	// Instead of file: where the key set is served.
	URL string `yaml:"url"`
	// PEM file of the CAs that issue the URL's certificate; by default, those of the
	// system.
	CA string `yaml:"ca"`
	// File of the token that is shown at the URL; by default none.
	TokenFile string `yaml:"token_file"`
}

// istioIssuer is one OpenID Connect provider.
type istioIssuer struct {
	// Name of the provider in facts: node.id.
	Name string `yaml:"name"`
	// Address of the provider, as in its tokens.
	Issuer string `yaml:"issuer"`
	// PEM file of the CAs that issue the provider's certificate; by default, those of the
	// system.
	CA string `yaml:"ca"`
}

// nodeAttestation has one section for each method in plugins.go.
type nodeAttestation struct {
	// Single-use tokens made by `ca token create`. No settings.
	JoinToken config.Section `yaml:"join_token"`
	// An existing machine certificate. Settings: ca_bundle, the PEM file of
	// the CAs that issue machine certificates.
	X509PoP config.Section `yaml:"x509pop"`
	// Service account tokens of node agents in Kubernetes; see docs/kubernetes.md.
	K8sPSAT config.Section `yaml:"k8s_psat" settings:"pkg/attest/node/k8spsat"`
}

// overrides are the flags of `ca run` that stand above the file.
type overrides struct {
	trustDomain string
	dataDir     string
	listen      string
	adminSocket string
	metrics     string
}

// validated is what `ca run` works with.
type validated struct {
	settings
	file        *config.File // for errors that are found later
	trustDomain spiffeid.TrustDomain
	pins        [][sha256.Size]byte
	witnesses   []tree.Witness
	console     *consoleAccess // nil if there is none
	keys        keys.Store
	// intermediateKey and subject are the profile of what signs.
	intermediateKey keys.Kind
	subject         ca.Subject
}

// loadSettings reads path, lets the flags stand above it, fills in the
// defaults, and checks everything that can be checked without starting. A file
// that does not exist is an error only if it was asked for by name.
func loadSettings(path string, asked bool, o overrides) (*validated, error) {
	v := &validated{}
	file, err := config.Read(path)
	switch {
	case errors.Is(err, os.ErrNotExist) && !asked && o.trustDomain != "":
		if file, err = config.Parse("flags", nil); err != nil {
			return nil, err
		}
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w\n  Write one (see docs/configuration.md), or start without: ca run --trust-domain example.org", err)
	case err != nil:
		return nil, err
	}
	v.file = file
	if err := file.Decode(&v.settings); err != nil {
		return nil, err
	}
	override(&v.TrustDomain, o.trustDomain, "")
	override(&v.DataDir, o.dataDir, defaultDataDir)
	override(&v.Listen, o.listen, defaultListen)
	override(&v.AdminSocket, o.adminSocket, defaultAdminSocket)
	override(&v.MetricsListen, o.metrics, defaultMetrics)
	return v, v.check(file)
}

// override sets field to flag if that is given, else to otherwise if it is empty.
func override(field *string, flag, otherwise string) {
	if flag != "" {
		*field = flag
	} else if *field == "" {
		*field = otherwise
	}
}

func (v *validated) check(file *config.File) error {
	var problems []error
	bad := func(path, format string, args ...any) {
		problems = append(problems, file.Errorf(path, format, args...))
	}
	if v.TrustDomain == "" {
		bad("trust_domain", "missing; write the name under which identities are issued, such as trust_domain: example.org")
	} else {
		td, err := identity.ParseTrustDomain(v.TrustDomain)
		if err != nil {
			bad("trust_domain", "%v", err)
		}
		v.trustDomain = td
	}
	if v.Instance == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("find the host's name for `instance`: %w", err)
		}
		v.Instance = host
	}
	for _, path := range []*string{&v.DataDir, &v.AdminSocket} {
		if strings.HasPrefix(*path, "@") {
			continue // no file: an abstract socket
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	if _, _, err := net.SplitHostPort(v.Listen); err != nil {
		bad("listen", "%q is not an address; write host:port, or :8443 for all interfaces", v.Listen)
	}
	if v.MetricsListen != "off" {
		if _, _, err := net.SplitHostPort(v.MetricsListen); err != nil {
			bad("metrics_listen", "%q is not an address; write host:port, or off", v.MetricsListen)
		}
	}
	if err := peer.CheckPath(v.AdminSocket); err != nil {
		bad("admin_socket", "%v", err)
	}
	cli.CheckListeners([]cli.Listener{
		{Setting: "listen", Address: v.Listen},
		{Setting: "metrics_listen", Address: v.MetricsListen},
		{Setting: "console.listen", Address: v.Console.Listen},
		{Setting: "istio.listen", Address: v.Istio.Listen},
	}, bad)
	for i, w := range v.Ledger.Witnesses {
		witness, err := tree.NewWitness(w.URL, w.Key)
		if err != nil {
			bad(fmt.Sprintf("ledger.witnesses[%d]", i), "%v", err)
		}
		v.witnesses = append(v.witnesses, witness)
	}
	if q := v.Ledger.WitnessQuorum; q < 0 || q > len(v.Ledger.Witnesses) {
		bad("ledger.witness_quorum", "%d of %d witnesses cannot be reached; write a number from 0 to %d", q, len(v.Ledger.Witnesses), len(v.Ledger.Witnesses))
	}
	between := func(path string, d *config.Duration, otherwise, least, most time.Duration) time.Duration {
		got := d.Or(otherwise)
		if got < least || got > most {
			bad(path, "%v is out of range; write a duration from %v to %v", got, least, most)
		}
		*d = config.Duration(got)
		return got
	}
	maxTTL := between("svid.max_ttl", &v.SVID.MaxTTL, identity.MaxTTL, identity.MinTTL, identity.MaxTTL)
	between("svid.default_ttl", &v.SVID.DefaultTTL, min(time.Hour, maxTTL), identity.MinTTL, maxTTL)
	nodeTTL := between("svid.node_ttl", &v.SVID.NodeTTL, 4*time.Hour, identity.MinTTL, identity.MaxTTL)
	if a, on := v.Console.check(bad); on {
		v.console = a
	}
	between("svid.backdate", &v.SVID.Backdate, 5*time.Minute, time.Second, time.Hour)
	root := between("authority.root_life", &v.Authority.RootLife, 10*365*24*time.Hour, time.Hour, 30*365*24*time.Hour)
	// An intermediate is replaced at half of its life, and what it signed then
	// must still fit into the other half.
	between("authority.intermediate_life", &v.Authority.IntermediateLife, 7*24*time.Hour, 2*max(maxTTL, nodeTTL), root/2)
	override(&v.Revocation, "", revocationOff)
	if v.Revocation != revocationOff && v.Revocation != revocationLists {
		bad("revocation", "%q is neither off nor crl; write crl for revocation lists", v.Revocation)
	}
	for _, kind := range upstreamKinds(v.Upstream, slog.New(slog.DiscardHandler)) {
		if kind.section.Present() && v.Revocation == revocationLists {
			bad("revocation", "crl takes a root of this CA's own: what others sign below the root of upstream.%s has no list here and would be refused; write off, or leave out upstream", kind.name)
		}
	}
	v.openKeys(bad)
	v.checkProfile(bad)
	for i, text := range v.Upstream.RootsSHA256 {
		sum, err := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
		if err != nil || len(sum) != sha256.Size {
			bad(fmt.Sprintf("upstream.roots_sha256[%d]", i), "%.100q is not a SHA-256; write 64 hexadecimal digits", text)
			continue
		}
		v.pins = append(v.pins, [sha256.Size]byte(sum))
	}
	return errors.Join(problems...)
}
