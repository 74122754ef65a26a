package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/external"
	"github.com/meshid/meshid/pkg/identity"
)

func newUpstreamCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upstream",
		Short: "Try an upstream CA, or a plug-in that stands for one",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(newUpstreamCheckCommand(), newUpstreamTestCommand())
	return cmd
}

// upstreamFlags are those of both commands.
type upstreamFlags struct {
	life    time.Duration
	timeout time.Duration
	output  cli.OutputFlag
	log     cli.LogFlags
}

func (f *upstreamFlags) add(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&f.life, "life", 24*time.Hour, "life of the intermediates that are asked for")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 2*time.Minute, "how long one call may take")
	f.output.Add(cmd, "text", "json")
	f.log.Add(cmd)
}

func newUpstreamCheckCommand() *cobra.Command {
	var path string
	var f upstreamFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Ask the configured upstream CA for intermediates, and hold its answers against the contract",
		Long: `check asks the upstream CA of the configuration for intermediates as ca run does, or for
X.509-SVIDs if it signs each, and says what is wrong and how to repair it. The keys are forgotten: what was signed is of no use to
anybody, but it is in the upstream CA's records. The exit code is 1 if a check failed.`,
		Example: "  ca upstream check --config /etc/meshid/ca.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			logger, err := f.log.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			v, err := loadSettings(path, true, overrides{})
			if err != nil {
				return err
			}
			above, err := openUpstreamCA(v, logger)
			if err != nil {
				return err
			}
			if above == nil {
				return fmt.Errorf("%s has no upstream CA: write one of its kinds below upstream: (see docs/configuration.md)", path)
			}
			trial := &upstreamTrial{flags: &f, ca: above.CA, kind: above.Kind, trustDomain: v.trustDomain, pins: v.pins, leaves: above.Leaves}
			return trial.report(cmd)
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file")
	f.add(cmd)
	return cmd
}

func newUpstreamTestCommand() *cobra.Command {
	var f upstreamFlags
	var trustDomain string
	var environment []string
	cmd := &cobra.Command{
		Use:   "test [flags] -- COMMAND [ARGUMENT...]",
		Short: "Start a plug-in and hold it against the contract of proto/plugin/v1",
		Long: `test is for who writes a plug-in: it starts COMMAND as ca run would, asks for intermediates,
right and wrong ones, ends it and starts it again, and says what is wrong and how to repair it.
What the plug-in writes to standard error is shown as log lines. The exit code is 1 if a check failed.`,
		Example: "  ca upstream test -- ./my-plugin --server https://ca.internal\n  ca upstream test -- python3 plugin.py",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			logger, err := f.log.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			td, err := spiffeid.TrustDomainFromString(trustDomain)
			if err != nil {
				return fmt.Errorf("--trust-domain: %w", err)
			}
			program, err := findProgram(args[0])
			if err != nil {
				return err
			}
			open := func() (upstream.CA, error) {
				return external.New(external.Config{Command: append([]string{program}, args[1:]...), Environment: environment}, logger)
			}
			ca, err := open()
			if err != nil {
				return err
			}
			trial := &upstreamTrial{flags: &f, ca: ca, kind: pluginKind, trustDomain: td, open: open}
			return trial.report(cmd)
		},
	}
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "example.org", "trust domain of the intermediates that are asked for")
	cmd.Flags().StringSliceVar(&environment, "environment", nil, "variables that the plug-in gets too, by name")
	f.add(cmd)
	return cmd
}

// pluginKind is the kind of which somebody here writes the code.
const pluginKind = "external"

// upstreamTrial tries an upstream CA.
type upstreamTrial struct {
	flags       *upstreamFlags
	ca          upstream.CA
	kind        string
	trustDomain spiffeid.TrustDomain
	pins        [][32]byte
	open        func() (upstream.CA, error) // starts a plug-in anew; nil for other kinds
	leaves      bool                        // X.509-SVIDs are asked for, not intermediates

	// What the first answer was.
	anchor   *x509.Certificate
	serial   *big.Int
	asked    time.Duration
	notAfter time.Time
}

// check is one thing that is looked at, and how it went.
type check struct {
	Check   string `json:"check"`
	Outcome string `json:"outcome"` // ok, failed or skipped
	Detail  string `json:"detail,omitempty"`
	Fix     string `json:"fix,omitempty"`

	run func(context.Context) (detail string, err error)
}

// errSkipped is what a check returns that does not apply; the reason is its detail.
var errSkipped = errors.New("skipped")

// checks are all, in the order in which they are made. A CA that signs nothing is
// asked nothing further.
func (t *upstreamTrial) checks() []*check {
	// What repairs it is for who writes a plug-in, or for who operates a CA.
	fix := func(plugin, operator string) string {
		if t.kind == pluginKind {
			return plugin
		}
		return operator
	}
	configure := fmt.Sprintf("the error says what to change, here or there; what to set up there is in docs/upstream/%s.md", t.kind)
	if t.kind == "disk" {
		configure = "the error says what to change"
	}
	signs, lives := "signs an intermediate", "allow a longer life in the profile or template used there, or shorten authority.intermediate_life"
	if t.leaves {
		signs, lives = "signs an X.509-SVID", "allow a longer life in the profile or template used there, or shorten svid.max_ttl"
	}
	return []*check{
		{Check: signs, Fix: fix("the error says what to change; a plug-in's log lines are above", configure), run: t.first},
		{
			Check: "is the same CA the second time", run: t.second,
			Fix: fix("give each certificate a serial number of its own (RFC 5280 §4.1.2.2), and keep one root", "have one CA, with one root, behind the address that is configured"),
		},
		{Check: "is pinned", Fix: "compare the fingerprint with what the operators of that CA say, then write it to upstream.roots_sha256", run: t.pinned},
		{Check: "lives as long as was asked for", Fix: lives, run: t.lives},
		{Check: "announces its roots", Fix: fix("WatchRoots has to send all present roots at once, among them the one that signs", configure), run: t.watch},
		{Check: "signs while its roots are watched", Fix: fix("serve calls concurrently: with one worker, a watch keeps all others waiting", configure), run: t.whileWatched},
		{
			Check: "refuses a request that does not prove its key", run: t.forged,
			Fix: fix("check the signature of the CSR before signing", "this CA certifies keys of others: ask its operators or makers why"),
		},
		{
			Check: "refuses a request that is no CSR", run: t.garbage,
			Fix: fix("answer INVALID_ARGUMENT when the CSR cannot be parsed", "ask the operators or makers of this CA why"),
		},
		{
			Check: "goes on after a call was given up", run: t.givenUp,
			Fix: fix("a call whose deadline has passed must not keep the next one waiting", "the error says what came instead; a limit of its rate can be why"),
		},
		{Check: "ends when it is told to", Fix: "end when standard input ends, and at SIGTERM", run: t.ends},
		{Check: "is the same CA after a restart", Fix: "keep the CA's key where the next process finds it", run: t.restarted},
	}
}

// report makes all checks and says how they went.
func (t *upstreamTrial) report(cmd *cobra.Command) error {
	format, err := t.flags.output.Format()
	if err != nil {
		return err
	}
	if t.flags.life <= 0 || t.flags.timeout <= 0 {
		return errors.New("--life and --timeout must be above 0")
	}
	checks := t.checks()
	failed := 0
	for i, c := range checks {
		ctx, cancel := context.WithTimeout(cmd.Context(), t.flags.timeout)
		detail, err := c.run(ctx)
		cancel()
		c.Outcome, c.Detail = "ok", detail
		switch {
		case errors.Is(err, errSkipped):
			c.Outcome, c.Fix = "skipped", ""
		case err != nil:
			c.Outcome, c.Detail = "failed", err.Error()
			failed++
		default:
			c.Fix = ""
		}
		if format == "text" {
			printCheck(cmd.OutOrStdout(), c)
		}
		if err != nil && i == 0 {
			checks = checks[:1]
			if closer, ok := t.ca.(io.Closer); ok {
				_ = closer.Close() // the first error is the one to repair
			}
			break
		}
	}
	if format == "json" {
		if err := cli.JSON(cmd.OutOrStdout(), map[string]any{"checks": checks, "failed": failed}); err != nil {
			return err
		}
	}
	if err := cmd.Context().Err(); err != nil {
		return err
	}
	if failed > 0 {
		return &cli.ExitError{Code: 1}
	}
	return nil
}

func printCheck(w io.Writer, c *check) {
	mark := map[string]string{"ok": cli.Paint(w, cli.Green, "ok     "), "failed": cli.Paint(w, cli.Red, "FAILED "), "skipped": "skipped"}[c.Outcome]
	fmt.Fprintf(w, "%s  %s", mark, c.Check)
	if c.Detail != "" {
		fmt.Fprintf(w, ": %s", c.Detail)
	}
	fmt.Fprintln(w)
	if c.Fix != "" {
		fmt.Fprintf(w, "         fix: %s\n", c.Fix)
	}
}

// request makes a request for an intermediate with a new key.
func (t *upstreamTrial) request() (*upstream.Request, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if t.leaves {
		return t.leaf(key)
	}
	subject := pkix.Name{CommonName: "meshid trial", SerialNumber: strings.ToLower(rand.Text())}
	return upstream.NewRequest(t.trustDomain, key, subject, t.flags.life, t.ca.Capabilities())
}

// leaf makes a request for an X.509-SVID, of a SPIFFE ID that no workload has.
func (t *upstreamTrial) leaf(key *ecdsa.PrivateKey) (*upstream.Request, error) {
	names := pkcs10.Names{URI: t.trustDomain.IDString() + identity.ReservedPath + "trial"}
	csr, err := pkcs10.Sign(key, names)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return upstream.NewLeaf(t.trustDomain, csr, spki, names, t.flags.life, t.ca.Capabilities())
}

// sign has the CA sign a request.
func (t *upstreamTrial) sign(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	if signer, ok := t.ca.(upstream.LeafSigner); ok && t.leaves {
		return signer.SignLeaf(ctx, r)
	}
	return t.ca.Mint(ctx, r)
}

func (t *upstreamTrial) mint(ctx context.Context) (*upstream.Verified, error) {
	r, err := t.request()
	if err != nil {
		return nil, err
	}
	m, err := t.sign(ctx, r)
	if err != nil {
		return nil, err
	}
	t.asked = r.TTL
	return r.Verify(time.Now(), m)
}

func (t *upstreamTrial) first(ctx context.Context) (string, error) {
	v, err := t.mint(ctx)
	if err != nil {
		return "", err
	}
	t.anchor, t.serial, t.notAfter = v.Anchors[0], v.Chain[0].SerialNumber, v.NotAfter
	return fmt.Sprintf("a chain of %d below the root %.100q", len(v.Chain), v.Anchors[0].Subject), nil
}

func (t *upstreamTrial) second(ctx context.Context) (string, error) {
	v, err := t.mint(ctx)
	switch {
	case err != nil:
		return "", err
	case v.Chain[0].SerialNumber.Cmp(t.serial) == 0:
		return "", errors.New("two intermediates have one serial number")
	case !slices.ContainsFunc(v.Anchors, t.anchor.Equal):
		return "", fmt.Errorf("the second intermediate is below another root, %.100q", v.Anchors[0].Subject)
	}
	return "", nil
}

func (t *upstreamTrial) pinned(context.Context) (string, error) {
	sum := sha256.Sum256(t.anchor.Raw)
	detail := "SHA-256 " + hex.EncodeToString(sum[:])
	switch {
	case len(t.pins) == 0:
		return "no roots_sha256 is set, the root is " + detail, errSkipped
	case !slices.Contains(t.pins, sum):
		return "", fmt.Errorf("its root is not among roots_sha256: %s", detail)
	}
	return detail, nil
}

// lives allows for a not_before in the past and for what the CA rounds.
func (t *upstreamTrial) lives(context.Context) (string, error) {
	left := time.Until(t.notAfter)
	if left < t.asked-t.asked/10-time.Minute {
		return "", fmt.Errorf("%s was asked for, and it ends in %s", cli.Short(t.asked), cli.Short(left))
	}
	return "", nil
}

// watched calls during once the roots were announced, and ends the watch then.
func (t *upstreamTrial) watched(ctx context.Context, during func() error) error {
	watcher, ok := t.ca.(upstream.RootWatcher)
	if !ok {
		return errSkipped
	}
	ctx, cancel := context.WithTimeoutCause(ctx, t.flags.timeout/4, errSkipped)
	defer cancel()
	done := errors.New("done")
	err := watcher.WatchRoots(ctx, func(roots []*x509.Certificate) error {
		for _, r := range roots {
			if err := upstream.CheckRoot(t.trustDomain, r); err != nil {
				return fmt.Errorf("root %.100q: %w", r.Subject, err)
			}
		}
		if !slices.ContainsFunc(roots, t.anchor.Equal) {
			return fmt.Errorf("the root that signs, %.100q, is not among those announced", t.anchor.Subject)
		}
		return cmp.Or(during(), done)
	})
	if errors.Is(err, done) {
		return nil
	}
	return err
}

func (t *upstreamTrial) watch(ctx context.Context) (string, error) {
	return unwatched(t.watched(ctx, func() error { return nil }))
}

func (t *upstreamTrial) whileWatched(ctx context.Context) (string, error) {
	return unwatched(t.watched(ctx, func() error {
		_, err := t.mint(ctx)
		return err
	}))
}

// unwatched gives a check that does not apply its reason.
func unwatched(err error) (string, error) {
	if errors.Is(err, errSkipped) {
		return "this one tells of no changes of its roots; those of each answer count", errSkipped
	}
	return "", err
}

// refused has the CA asked for what it must refuse.
func (t *upstreamTrial) refused(ctx context.Context, spoil func(*upstream.Request) error) (string, error) {
	r, err := t.request()
	if err != nil {
		return "", err
	}
	if err := spoil(r); err != nil {
		return "", err
	}
	_, err = t.sign(ctx, r)
	switch {
	case err == nil:
		return "", errors.New("it was signed")
	case errors.Is(err, upstream.ErrUnavailable):
		return "", fmt.Errorf("it fails instead: %w", err)
	}
	return "", nil
}

func (t *upstreamTrial) forged(ctx context.Context) (string, error) {
	return t.refused(ctx, func(r *upstream.Request) error {
		r.CSR = slices.Clone(r.CSR)
		r.CSR[len(r.CSR)-1] ^= 1 // the signature is last
		var err error
		r.Request, err = x509.ParseCertificateRequest(r.CSR)
		return err
	})
}

func (t *upstreamTrial) garbage(ctx context.Context) (string, error) {
	return t.refused(ctx, func(r *upstream.Request) error {
		r.CSR, r.Request = []byte("this is not a CSR"), &x509.CertificateRequest{PublicKey: r.Request.PublicKey}
		return nil
	})
}

func (t *upstreamTrial) givenUp(ctx context.Context) (string, error) {
	soon, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	_, _ = t.mint(soon) // it may have been quick enough
	_, err := t.mint(ctx)
	return "", err
}

func (t *upstreamTrial) ends(context.Context) (string, error) {
	closer, ok := t.ca.(io.Closer)
	if !ok {
		return "there is no process to end", errSkipped
	}
	return "", closer.Close()
}

func (t *upstreamTrial) restarted(ctx context.Context) (_ string, err error) {
	if t.open == nil {
		return "there is no process to start again", errSkipped
	}
	if t.ca, err = t.open(); err != nil {
		return "", err
	}
	if closer, ok := t.ca.(io.Closer); ok {
		defer func() { err = errors.Join(err, closer.Close()) }()
	}
	return t.second(ctx)
}

// findProgram returns the absolute path of a program, as a shell finds it.
func findProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", err
	}
	return filepath.Abs(path)
}
