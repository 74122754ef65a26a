package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ca"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// newRotationCommands are those that have a root take its next step.
func newRotationCommands(c *clientFlags) []*cobra.Command {
	show := printing(&cobra.Command{
		Use:   "show",
		Short: "Say how far the roots are, and who has not acknowledged the trust bundle",
		Args:  cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.Rotation, error) {
		return getRotation(cmd.Context(), c)
	}, showRotation, "text")
	step := func(use, short, long string, override bool) *cobra.Command {
		verb, _, takesRoot := strings.Cut(use, " ")
		var insist bool
		cmd := &cobra.Command{Use: use, Short: short, Long: long, Args: cobra.NoArgs}
		if takesRoot {
			cmd.Args = cobra.MaximumNArgs(1)
			cmd.ValidArgsFunction = completeRoots(c)
		}
		printing(cmd, func(cmd *cobra.Command, args []string) (*adminv1.Rotation, error) {
			return changeRotation(cmd.Context(), c, verb, slices.Concat(args, []string{""})[0], insist)
		}, showRotation, "text")
		if override {
			cmd.Flags().BoolVar(&insist, "override", false, "do it though somebody may be cut off; recorded in the ledger")
		}
		return cmd
	}
	return []*cobra.Command{
		show, newAuthorityAdopt(c),
		step("prepare", "Make a root and have it distributed; it signs nothing yet",
			"Make a root and have it distributed. It signs nothing until: ca authority activate", false),
		step("activate [ROOT]", "Have the next root sign, once it is distributed",
			"Have the next root sign. It is refused while a live proxy has not acknowledged it.", true),
		step("taint [ROOT]", "Replace all that a root signed, with its successor",
			"Replace all that a root signed: a successor is made if there is none, distributed and activated, every\nX.509-SVID is renewed, and then the tainted root leaves the bundle.", false),
		step("retire [ROOT]", "Take a root out of the trust bundle",
			"Take a root out of the trust bundle. It is refused while something lives that chains to it.", true),
		step("rollback", "Undo a rotation that is under way", "Withdraw a root that has not signed yet, or have the one before sign again.", false),
		step("pause", "Keep the roots from changing by themselves", "Keep the roots from changing by themselves until: ca authority resume", false),
		step("resume", "Let the roots change by themselves again", "Let the roots change by themselves again.", false),
	}
}

func newAuthorityAdopt(c *clientFlags) *cobra.Command {
	var self, wait bool
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "adopt",
		Short: "Change over to the root of the configured upstream CA, or back",
		Long: `Change over to the root of the configured upstream CA, or with --self back to a
root of this CA's own. It takes the same steps as a rotation: nothing signs with
the new root before every live proxy has acknowledged it.`,
		Example: `  ca authority adopt --wait
  ca authority adopt --self`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			verb := "adopt"
			if self {
				verb = "adopt-self"
			}
			return changeRoot(cmd, c, verb, format, wait, showRotation)
		},
	}
	out.Add(cmd, "text", "json")
	cmd.Flags().BoolVar(&self, "self", false, "back to a root of this CA's own")
	cmd.Flags().BoolVar(&wait, "wait", false, "show the progress until everything is renewed; events as JSON lines with -o json")
	return cmd
}

func completeRoots(c *clientFlags) cobra.CompletionFunc {
	return completeArgs(1, func(ctx context.Context) (ids []cobra.Completion, _ error) {
		r, err := getRotation(ctx, c)
		for _, root := range r.GetRoots() {
			ids = append(ids, cobra.CompletionWithDesc(root.GetId(), stateText(root)))
		}
		return ids, err
	})
}

func getRotation(ctx context.Context, c *clientFlags) (*adminv1.Rotation, error) {
	answer, err := call(ctx, c, adminv1.AdminServiceClient.GetRotation, &adminv1.GetRotationRequest{})
	return answer.GetRotation(), err
}

// changeTimeout bounds a change of roots: an upstream CA may take its time.
const changeTimeout = 3 * time.Minute

func changeRotation(ctx context.Context, c *clientFlags, verb, root string, override bool) (*adminv1.Rotation, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	answer, err := call(ctx, c, adminv1.AdminServiceClient.ChangeRotation, &adminv1.ChangeRotationRequest{Verb: verb, Root: root, Override: override})
	if h := answer.GetHeld(); h != nil {
		return nil, notDoneYet(h)
	}
	return answer.GetRotation(), err
}

func showRotation(cmd *cobra.Command, _ string, r *adminv1.Rotation) error {
	w, now := cmd.OutOrStdout(), time.Now()
	paused := ""
	if r.GetPaused() {
		paused = ", " + cli.Paint(w, cli.Yellow, "paused")
	}
	fmt.Fprintf(w, "bundle   sequence %d, %d roots%s\nproxies  %d of %d have acknowledged it, on %d of %d nodes\n", r.GetBundleSequence(), len(r.GetRoots()), paused,
		r.GetProxiesAcknowledged(), r.GetProxies(), r.GetNodes()-r.GetNodesWaiting(), r.GetNodes())
	if r.GetStalled() != "" {
		fmt.Fprintf(w, "stalled  %s\n", cli.Paint(w, cli.Yellow, cli.Printable(r.GetStalled())))
	}
	for _, l := range r.GetLaggards() {
		fmt.Fprintf(w, "waiting  %s\n", laggardText(now, l))
	}
	for _, root := range r.GetRoots() {
		for _, h := range root.GetHolders() {
			fmt.Fprintf(w, "holds    %s\n", holderText(root.GetId(), h))
		}
	}
	var rows [][]string
	for _, root := range r.GetRoots() {
		live := "-"
		if root.GetLiveUntil() != nil {
			live = cli.Until(now, root.GetLiveUntil().AsTime())
		}
		origin := "own"
		if root.GetUpstream() {
			origin = "upstream"
		}
		rows = append(rows, []string{
			root.GetId(), stateText(root), cli.Until(now, root.GetSince().AsTime()), origin, cli.Until(now, root.GetNotAfter().AsTime()),
			fmt.Sprint(root.GetSvids()), live,
		})
	}
	return cli.Table(w, []string{"ROOT", "STATE", "SINCE", "ORIGIN", "EXPIRES", "SVIDS", "IN USE AT MOST"}, rows)
}

// holderText says who keeps a root that signs no more in the bundle, and until when.
func holderText(root string, h *adminv1.RootHolder) string {
	text := h.GetNodeId()
	if h.GetBelow() {
		text += " (a CA below)"
	}
	switch {
	case !h.GetConnected():
		text += ": not connected, what it has that chains to root " + root + " is not known"
	case !h.GetCounted():
		text += ": has not said what it has that chains to root " + root
	case h.GetBelow():
		text += ": its intermediate chains to root " + root + "; it asks for the next one by itself, or now with ca authority rotate there"
	default:
		text += fmt.Sprintf(": %d X.509-SVIDs that chain to root %s", h.GetSvids(), root)
	}
	if h.GetUntil() != nil && (h.GetBelow() || !h.GetConnected()) {
		text += "; until " + h.GetUntil().AsTime().UTC().Format(time.RFC3339) + " at most"
	}
	return text
}

func laggardText(now time.Time, l *adminv1.Laggard) string {
	since := cli.Short(max(now.Sub(l.GetSince().AsTime()), 0))
	below := ""
	if l.GetBelow() {
		below = " (a CA below)"
	}
	switch {
	case !l.GetConnected() && l.GetSince().AsTime().Year() < 2000: // it never was
		return fmt.Sprintf("%s%s: not connected since this CA started, waited for until %s", l.GetNodeId(), below, l.GetWaitedUntil().AsTime().UTC().Format(time.RFC3339))
	case l.GetBelow() && l.GetConnected() && l.GetWaitsFor() == "":
		return l.GetNodeId() + below + ": has not said that all of its proxies have the bundle"
	case l.GetBelow() && l.GetConnected():
		return fmt.Sprintf("%s%s: it waits for %s", l.GetNodeId(), below, cli.Printable(l.GetWaitsFor()))
	case !l.GetConnected():
		return fmt.Sprintf("%s%s: not connected, last heard of %s ago, waited for until %s", l.GetNodeId(), below, since, l.GetWaitedUntil().AsTime().UTC().Format(time.RFC3339))
	case l.GetName() == "":
		return l.GetNodeId() + ": its agent has not said that it has the bundle"
	default:
		return fmt.Sprintf("%s: %s has bundle %d, since %s", l.GetNodeId(), cli.Printable(l.GetName()), l.GetAcknowledged(), since)
	}
}

func newAuthorityRotate(c *clientFlags) *cobra.Command {
	var within time.Duration
	var wait, compromised bool
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "rotate [intermediate|root]",
		Short: "Replace what signs now, and renew what it signed",
		Long: `Replace this CA's intermediate (the default), or the root of the trust domain.

A new intermediate signs at once: its root is in every bundle. A new root is
distributed first, signs when every live proxy has acknowledged it, and the old
one leaves the bundle when nothing that it signed lives any more.

With --compromised the root is replaced because its key is lost: everything that
it signed is renewed at a bounded rate, what expires first first, and the old root
leaves as soon as no node uses it.`,
		Example: `  ca authority rotate
  ca authority rotate root --wait
  ca authority rotate root --compromised --wait`,
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"intermediate", "root"},
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			if len(args) == 1 && args[0] == "root" || compromised {
				verb := "rotate"
				if compromised {
					verb = "taint"
				}
				return changeRoot(cmd, c, verb, format, wait, sayBegun)
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.RotateIntermediate, &adminv1.RotateIntermediateRequest{Within: durationpb.New(within)})
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			if answer.GetAuthority().GetState() == ca.StatePrepared {
				fmt.Fprintf(cmd.OutOrStdout(), "intermediate %s is prepared; it signs when its revocation list is in force at all live proxies, and the nodes then renew what the old one signed within %v\n",
					answer.GetAuthority().GetId(), within)
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "intermediate %s is active; the nodes renew what the old one signed within %v\n", answer.GetAuthority().GetId(), within)
			return nil
		},
	}
	out.Add(cmd, "text", "json")
	withinFlag(cmd, &within)
	cmd.Flags().BoolVar(&wait, "wait", false, "of a root: show the progress until everything is renewed; events as JSON lines with -o json")
	cmd.Flags().BoolVar(&compromised, "compromised", false, "the root's key is lost: have the root leave as soon as nothing uses it")
	return cmd
}

// pollEvery is how often the progress of a rotation is asked for.
const pollEvery = 500 * time.Millisecond

// sayBegun is for whoever does not wait.
func sayBegun(cmd *cobra.Command, _ string, r *adminv1.Rotation) error {
	text := "the rotation has begun; follow it with: ca authority show"
	if r.GetPaused() {
		text = "the rotation is prepared, and goes on when it is no longer paused: ca authority resume"
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), text)
	return err
}

// changeRoot orders another root, and shows how that goes if wait is set, else say does.
func changeRoot(cmd *cobra.Command, c *clientFlags, verb, format string, wait bool, say func(*cobra.Command, string, *adminv1.Rotation) error) error {
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	before, err := getRotation(ctx, c)
	if err != nil {
		return err
	}
	r, err := changeRotation(ctx, c, verb, "", false)
	if err != nil {
		return err
	}
	if !wait {
		if format == "json" {
			return cli.JSON(w, r)
		}
		return say(cmd, format, r)
	}
	p := &rotationProgress{changes: newChanges(w, format), begun: time.Now(), old: activeRoot(before), gone: verb == "taint"}
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		if p.undone(r) {
			p.end()
			return fmt.Errorf("the rotation was rolled back: root %s goes on signing; ca ledger find says who did it", p.old)
		}
		over, err := p.show(time.Now(), r)
		if err != nil || over {
			return err
		}
		select {
		case <-ctx.Done():
			p.end()
			return errors.New("interrupted: the rotation goes on; follow it with ca authority show, stop it with ca authority pause or rollback")
		case <-ticker.C:
		}
		if r, err = getRotation(ctx, c); err != nil {
			p.end()
			return fmt.Errorf("%w\n  The rotation goes on without this command; follow it with: ca authority show", err)
		}
	}
}

// activeRoot is the id of the root that signs.
func activeRoot(r *adminv1.Rotation) string {
	for _, root := range r.GetRoots() {
		if root.GetState() == ca.StateActive {
			return root.GetId()
		}
	}
	return ""
}

// rotationProgress shows how a rotation goes.
type rotationProgress struct {
	changes
	begun time.Time
	// old is the root that is replaced; gone has the end wait until it has left.
	old  string
	gone bool

	total, renewed uint32
	renewing       time.Time
}

// undone says whether the old root signs on, with nobody to follow it.
func (p *rotationProgress) undone(r *adminv1.Rotation) bool {
	for _, root := range r.GetRoots() {
		switch state := root.GetState(); {
		case state == "prepared", state == "distributed", state == "active" && root.GetId() != p.old:
			return false
		}
	}
	return true
}

// event is what -o json writes, one a line.
type event struct {
	// Phase is "distributing", "renewing", "draining" or "done".
	Phase               string   `json:"phase"`
	Time                string   `json:"time"`
	BundleSequence      uint64   `json:"bundle_sequence"`
	Proxies             uint32   `json:"proxies"`
	ProxiesAcknowledged uint32   `json:"proxies_acknowledged"`
	SVIDs               uint32   `json:"svids"`
	SVIDsRenewed        uint32   `json:"svids_renewed"`
	Rate                float64  `json:"svids_renewed_per_second"`
	RemainingSeconds    float64  `json:"remaining_seconds,omitempty"`
	Laggards            []string `json:"laggards,omitempty"`
	// Holders are those who keep the old root in the bundle and do not do anything
	// about it as part of this rotation: CAs below, and nodes that are not connected.
	Holders []string `json:"holders,omitempty"`
	Stalled string   `json:"stalled,omitempty"`
	Paused  bool     `json:"paused,omitempty"`

	nodes, nodesWaiting uint32
}

// belowIn is what CAs below say that they wait for.
func belowIn(r *adminv1.Rotation) (text string) {
	for _, l := range r.GetLaggards() {
		text += l.GetWaitsFor() + "\n"
	}
	return text
}

func (p *rotationProgress) event(now time.Time, r *adminv1.Rotation) event {
	e := event{
		Phase: "distributing", Time: now.UTC().Format(time.RFC3339), BundleSequence: r.GetBundleSequence(),
		Proxies: r.GetProxies(), ProxiesAcknowledged: r.GetProxiesAcknowledged(), Stalled: r.GetStalled(), Paused: r.GetPaused(),
		nodes: r.GetNodes(), nodesWaiting: r.GetNodesWaiting(),
	}
	for _, l := range r.GetLaggards() {
		e.Laggards = append(e.Laggards, laggardText(now, l))
	}
	i := slices.IndexFunc(r.GetRoots(), func(root *adminv1.Root) bool { return root.GetId() == p.old })
	signs := slices.ContainsFunc(r.GetRoots(), func(root *adminv1.Root) bool { return root.GetState() == "active" && root.GetId() != p.old })
	old := uint32(0)
	if i >= 0 {
		old = r.GetRoots()[i].GetSvids()
		for _, h := range r.GetRoots()[i].GetHolders() {
			if h.GetBelow() || !h.GetConnected() {
				e.Holders = append(e.Holders, holderText(p.old, h))
			}
		}
	}
	switch {
	case !signs:
		p.total = max(p.total, old)
	case i < 0, old == 0 && !p.gone:
		e.Phase = "done"
	case old == 0:
		e.Phase = "draining"
	default:
		e.Phase = "renewing"
	}
	if signs {
		if p.renewing.IsZero() {
			p.renewing = now
		}
		p.total = max(p.total, old)
		p.renewed = max(p.renewed, p.total-old)
		if took := now.Sub(p.renewing).Seconds(); took > 0 {
			e.Rate = float64(p.renewed) / took
		}
		if e.Rate > 0 {
			e.RemainingSeconds = float64(old) / e.Rate
		}
	}
	e.SVIDs, e.SVIDsRenewed = p.total, p.renewed
	return e
}

// show writes what has changed and reports whether there is nothing more to wait
// for.
func (p *rotationProgress) show(now time.Time, r *adminv1.Rotation) (over bool, err error) {
	e := p.event(now, r)
	over = e.Phase == "done"
	text := e.text(p.terminal)
	// Times and rates alone are no news, but for a terminal.
	key := fmt.Sprint(e.Phase, e.BundleSequence, e.Proxies, e.ProxiesAcknowledged, e.SVIDs, e.SVIDsRenewed, len(e.Laggards), len(e.Holders), e.Stalled, e.Paused, belowIn(r))
	err = p.changes.show(key, text, func() ([]byte, error) { return json.Marshal(e) })
	if !over || err != nil {
		return over, err
	}
	p.end()
	if !p.json {
		took := now.Sub(p.begun)
		if i := slices.IndexFunc(r.GetRoots(), func(root *adminv1.Root) bool { return root.GetId() == p.old }); i >= 0 {
			fmt.Fprintf(p.w, "done in %s; root %s stays in the bundle until nothing that it signed lives, %s at most\n",
				cli.Short(took), p.old, cli.Until(now, r.GetRoots()[i].GetLiveUntil().AsTime()))
			for _, h := range e.Holders {
				fmt.Fprintf(p.w, "  %s %s\n", cli.Paint(p.w, cli.Yellow, "not yet:"), h)
			}
		} else {
			fmt.Fprintf(p.w, "done in %s; root %s has left the bundle\n", cli.Short(took), p.old)
		}
	}
	return true, nil
}

const barWidth = 20

func (e event) text(short bool) string {
	part, all := e.ProxiesAcknowledged, e.Proxies
	switch {
	case e.Phase != "distributing":
		part, all = e.SVIDsRenewed, e.SVIDs
	case part >= all && len(e.Laggards) > 0: // no proxy is late, but a node or a CA below
		part, all = e.nodes-min(e.nodesWaiting, e.nodes), e.nodes
	}
	full := barWidth
	if all > 0 {
		full = int(float64(barWidth) * float64(min(part, all)) / float64(all))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s [%s%s] ", e.Phase, strings.Repeat("#", full), strings.Repeat(".", barWidth-full))
	fmt.Fprintf(&b, "%d of %d proxies acknowledged", e.ProxiesAcknowledged, e.Proxies)
	if e.Paused {
		b.WriteString(", paused (ca authority resume)")
	}
	if e.Phase != "distributing" {
		fmt.Fprintf(&b, ", %d of %d svids renewed, %.0f/s", e.SVIDsRenewed, e.SVIDs, e.Rate)
		if e.RemainingSeconds > 0 {
			fmt.Fprintf(&b, ", %s left", cli.Short(time.Duration(e.RemainingSeconds*float64(time.Second))))
		}
	}
	waiting := e.Laggards
	if e.Phase != "distributing" {
		waiting = e.Holders
	}
	if e.Phase == "done" || len(waiting) == 0 {
		return b.String()
	}
	if short {
		fmt.Fprintf(&b, ", waiting for %s", waiting[0])
		if n := len(waiting) - 1; n > 0 {
			fmt.Fprintf(&b, " and %d more", n)
		}
		return b.String()
	}
	for _, l := range waiting {
		fmt.Fprintf(&b, "\n  waiting for %s", l)
	}
	return b.String()
}
