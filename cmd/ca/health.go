package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
)

// Conditions that are reported here: pkg/ca and pkg/ledger do not know of health.
const (
	conditionAuthority = "authority"
	conditionLedger    = "ledger"
	conditionTree      = "ledger_tree"
	conditionWitness   = "ledger_witness"
)

// healthInterval is how often the authority and the journal are looked at.
const healthInterval = 5 * time.Second

// reportLedger keeps the condition of the ledger; it is ledger.Options.OnState.
func reportLedger(t *health.Tracker) func(error) {
	return func(err error) {
		if err != nil {
			t.Set(conditionLedger, health.Error, "nothing is issued: "+err.Error())
			return
		}
		t.Clear(conditionLedger)
	}
}

// report keeps one condition.
func report(t *health.Tracker, name string, warning, failure error) {
	switch {
	case failure != nil:
		t.Set(name, health.Error, failure.Error())
	case warning != nil:
		t.Set(name, health.Warning, warning.Error())
	default:
		t.Clear(name)
	}
}

// watchHealth keeps the conditions of the authority and of the ledger's tree until
// ctx ends. A journal that can never be written again ends the program: it cannot
// know what is on the disk, and only opening the journal anew can tell.
func watchHealth(ctx context.Context, authority *ca.CA, journal *ledger.Journal, proofs *tree.Tree, t *health.Tracker) error {
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	for {
		now := time.Now()
		warning, failure := authority.Health(now)
		report(t, conditionAuthority, warning, failure)
		warning, failure = proofs.Health(now)
		report(t, conditionTree, warning, failure)
		report(t, conditionWitness, proofs.WitnessHealth(now), nil)
		select {
		case <-ctx.Done():
			return nil
		case <-journal.Broken():
			return fmt.Errorf("the ledger cannot be written any more: %w\n  Check the disk under data_dir, then start again", journal.Failed())
		case <-ticker.C:
		}
	}
}
