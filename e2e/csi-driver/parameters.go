package main

import (
	"strconv"
	"strings"
	"time"
)

// The sidecars add parameters with this prefix; they are not the class author's.
const sidecarPrefix = "csi.storage.k8s.io/"

// cutParameters are those of a VolumeSnapshotClass or VolumeGroupSnapshotClass.
type cutParameters struct {
	mode          string        // crash, frozen or torn
	delay         time.Duration // fault: the call takes so long before it cuts
	readyAfter    time.Duration // fault: ready to use only so long after the cut
	failures      int           // fault: so many calls fail before one succeeds
	hideOneChange bool          // fault: changed blocks leave out a range
}

const (
	modeCrash  = "crash"  // as a power cut leaves it
	modeFrozen = "frozen" // file systems are frozen first
	modeTorn   = "torn"   // copied one after the other: not a cut at all
)

// onlyKnown refuses parameters of a StorageClass: there are none but the sidecars'.
func onlyKnown(p map[string]string) error {
	for k := range p {
		if !strings.HasPrefix(k, sidecarPrefix) {
			return invalid("unknown parameter %q", k)
		}
	}
	return nil
}

// A typing error in a class must not give a test that silently injects nothing, so unknown keys
// and values are refused.
func parseCut(p map[string]string) (c cutParameters, err error) {
	c.mode = modeCrash
	for k, v := range p {
		switch k {
		case "mode":
			c.mode = v
			if v != modeCrash && v != modeFrozen && v != modeTorn {
				err = strconv.ErrSyntax
			}
		case "delay":
			c.delay, err = time.ParseDuration(v)
		case "readyAfter":
			c.readyAfter, err = time.ParseDuration(v)
		case "failures":
			c.failures, err = strconv.Atoi(v)
		case "changedBlocks":
			c.hideOneChange = v == "incomplete"
			if v != "incomplete" && v != "exact" {
				err = strconv.ErrSyntax
			}
		default:
			if !strings.HasPrefix(k, sidecarPrefix) {
				return c, invalid("unknown parameter %q", k)
			}
		}
		if err != nil || c.delay < 0 || c.readyAfter < 0 || c.failures < 0 {
			return c, invalid("parameter %q has no such value: %q", k, v)
		}
	}
	return c, nil
}
