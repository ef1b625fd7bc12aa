"""Tests of the host: arrays, requests, dispatch, execution, functional calls, plan cache."""
